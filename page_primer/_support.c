/* page_primer._core, for all of its functions: errors, arguments, types. */

#include "_core.h"

#include <string.h>

/* The headers of 3.12 and newer leave the reference out of Py_RETURN_NONE, and
 * those of 3.13 changed what "#" means in formats; a module built with them for
 * the stable ABI of 3.10 must do neither.
 */
PyObject *
none(void)
{
    Py_INCREF(Py_None);
    return Py_None;
}

/* ------------------------------------------------------------- errors --- */

/* Set _core.Error(errno, "step 0x..-0x..: strerror"), without a range where
 * there is none, with the attributes step, start and end; always returns NULL.
 */
PyObject *
fail(PyObject *module, int number, const char *step, uintptr_t start,
     uintptr_t end)
{
    core_state *state = PyModule_GetState(module);
    PyObject *text = NULL, *error = NULL, *value = NULL;

    if (end == 0)
        text = PyUnicode_FromFormat("%s: %s", step, strerror(number));
    else
        text = PyUnicode_FromFormat("%s %p-%p: %s", step, (void *)start,
                                    (void *)end, strerror(number));
    if (text == NULL)
        goto done;
    error = PyObject_CallFunction(state->error, "iO", number, text);
    if (error == NULL)
        goto done;
    value = PyUnicode_FromString(step);
    if (value == NULL || PyObject_SetAttrString(error, "step", value) < 0)
        goto done;
    Py_DECREF(value);
    value = PyLong_FromUnsignedLongLong(start);
    if (value == NULL || PyObject_SetAttrString(error, "start", value) < 0)
        goto done;
    Py_DECREF(value);
    value = PyLong_FromUnsignedLongLong(end);
    if (value == NULL || PyObject_SetAttrString(error, "end", value) < 0)
        goto done;
    PyErr_SetObject(state->error, error);
done:
    Py_XDECREF(text);
    Py_XDECREF(error);
    Py_XDECREF(value);
    return NULL;
}

/* ---------------------------------------------------------- arguments --- */

/* "O&" converter for addresses, lengths and file offsets, to a uint64_t: what
 * is negative or too large is an OverflowError, what is no integer a
 * TypeError.  ("K" would take the low 64 bits of anything.)
 */
int
to_uint64(PyObject *value, void *result)
{
    PyObject *number = PyNumber_Index(value);
    unsigned long long converted;

    if (number == NULL)
        return 0;
    converted = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (converted == (unsigned long long)-1 && PyErr_Occurred())
        return 0;
    *(uint64_t *)result = converted;
    return 1;
}

/* 0, or -1 with OverflowError set where a range wraps around. */
int
check_range(uint64_t address, uint64_t length)
{
    if (length <= UINTPTR_MAX - address)
        return 0;
    PyErr_SetString(PyExc_OverflowError,
                    "range ends beyond the address space");
    return -1;
}

/* Parse (address, length) for a function that takes nothing else; 0, or -1
 * with an exception set.  `format` is "O&O&:name".
 */
int
parse_range(PyObject *args, const char *format, uint64_t *address,
            uint64_t *length)
{
    if (!PyArg_ParseTuple(args, format, to_uint64, address, to_uint64, length))
        return -1;
    return check_range(*address, *length);
}

/* -------------------------------------------------------------- types --- */

/* Make a type, for the module and its state; 0, or -1 with an exception. */
int
add_type(PyObject *module, PyType_Spec *spec, PyObject **type)
{
    *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (*type == NULL && !PyErr_Occurred()) /* CPython 3.11, out of memory */
        PyErr_NoMemory();
    if (*type == NULL)
        return -1;
    return PyModule_AddType(module, (PyTypeObject *)*type);
}

/* The end of an object that PyObject_New() made. */
void
free_object(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);

    PyObject_Free(self);
    Py_DECREF(type);
}
