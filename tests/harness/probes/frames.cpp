// An extension module whose code is large enough to be moved, for tools to find frames in: C++
// frames that call back into Python, an exception thrown through the interpreter's frames, and
// backtrace(3) from within them.

#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <dlfcn.h>
#include <execinfo.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

// Five mebibytes of no operation: whole huge pages at any load address, on both sides of the
// functions below.
#ifdef __x86_64__
#define HALF "0x280000, 1, 0x90"
#else
#define HALF "0xa0000, 4, 0xd503201f"
#endif
__asm__(".text\n.fill " HALF "\n");

static std::string trace;

// Calls a callable; not a tail call, so that it stays on the stack.
extern "C" __attribute__((noinline)) PyObject *
frames_call_back(PyObject *, PyObject *callable)
{
    PyObject *result = PyObject_CallObject(callable, NULL);
    __asm__ volatile("" ::: "memory");
    return result;
}

extern "C" __attribute__((noinline)) PyObject *
frames_iter_throwing(PyObject *)
{
    throw std::runtime_error("thrown below the interpreter");
}

// The functions on the stack, by dladdr's and backtrace_symbols' reading of the loader's tables.
extern "C" __attribute__((noinline)) PyObject *
frames_iter_tracing(PyObject *)
{
    void *addresses[64];
    int count = backtrace(addresses, 64);
    char **symbols = backtrace_symbols(addresses, count);
    trace.clear();
    for (int i = 0; i < count; i++) {
        const char *name = strrchr(symbols[i], '(');
        trace += std::string(name ? name : "?").substr(0, 256);
        trace += "\n";
    }
    free(symbols);
    PyErr_SetString(PyExc_LookupError, "traced");
    return NULL;
}

static PyObject *
iterate(getiterfunc iter)
{
    PyType_Slot slots[] = {{Py_tp_iter, (void *)iter}, {0, NULL}};
    PyType_Spec spec = {"frames.Iterable", sizeof(PyObject), 0, Py_TPFLAGS_DEFAULT, slots};
    PyObject *type = PyType_FromSpec(&spec);
    PyObject *object = type ? PyObject_CallObject(type, NULL) : NULL;
    Py_XDECREF(type);
    if (object == NULL)
        return NULL;
    PyObject *result = NULL;
    try {
        // PySequence_Tuple calls PyObject_GetIter, which calls the slot, holding nothing yet.
        result = PySequence_Tuple(object);
    } catch (...) {
        Py_DECREF(object);
        throw;
    }
    Py_DECREF(object);
    return result;
}

// What was caught of an exception that was thrown below frames of the interpreter.
static PyObject *
throw_through(PyObject *, PyObject *)
{
    try {
        return iterate(frames_iter_throwing);
    } catch (const std::exception &error) {
        return PyUnicode_FromString(error.what());
    }
}

static PyObject *
backtrace_through(PyObject *, PyObject *)
{
    PyObject *nothing = iterate(frames_iter_tracing);
    Py_XDECREF(nothing);
    PyErr_Clear();
    return PyUnicode_FromString(trace.c_str());
}

// The address of a function, by name, as dlsym(3) finds it.
static PyObject *
address_of(PyObject *, PyObject *name)
{
    PyObject *bytes = PyUnicode_AsUTF8String(name);
    if (bytes == NULL)
        return NULL;
    void *found = dlsym(RTLD_DEFAULT, PyBytes_AsString(bytes));
    Py_DECREF(bytes);
    return PyLong_FromVoidPtr(found);
}

static PyMethodDef methods[] = {
    {"call_back", frames_call_back, METH_O, NULL},
    {"throw_through", throw_through, METH_NOARGS, NULL},
    {"backtrace_through", backtrace_through, METH_NOARGS, NULL},
    {"address_of", address_of, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "frames", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC
PyInit_frames(void)
{
    return PyModule_Create(&module);
}

__asm__(".text\n.fill " HALF "\n");
