/* page_primer._core: descriptors that somebody owns.
 *
 * Objects, and what they stand for goes with them.  An exception of the host's
 * may come at any bytecode (a signal handler's where another thread took the
 * signal, PyThreadState_SetAsyncExc()'s): also between the call that opened or
 * reserved something and the "try" that would give it back, or in that one's
 * "finally".  Between two statements in C it cannot.
 */

#include "_core.h"

#include <errno.h>
#include <stdbool.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD int fd; /* or -1: closed */
    bool kept;            /* beyond the object */
    bool known;           /* what it is: these two */
    dev_t device;
    ino_t inode;
} descriptor;

/* 0, or -1 with errno set. */
static int
close_once(descriptor *self)
{
    struct stat now;
    int fd = self->fd, number = 0;

    self->fd = -1;
    if (fd < 0)
        return 0;
    /* A server that daemonizes closes whatever is open, and may have opened
     * something of its own under the number. */
    Py_BEGIN_ALLOW_THREADS
    if (!self->known
        || (fstat(fd, &now) == 0 && now.st_dev == self->device
            && now.st_ino == self->inode))
        number = close(fd) < 0 ? errno : 0;
    Py_END_ALLOW_THREADS
    errno = number;
    return number ? -1 : 0;
}

static void
descriptor_dealloc(PyObject *self)
{
    if (!((descriptor *)self)->kept)
        (void)close_once((descriptor *)self);
    free_object(self);
}

static PyObject *
descriptor_close(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (close_once((descriptor *)self) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return none();
}

static PyObject *
descriptor_keep(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    ((descriptor *)self)->kept = true;
    return none();
}

static PyObject *
descriptor_number(PyObject *self)
{
    return PyLong_FromLong(((descriptor *)self)->fd);
}

static PyObject *
descriptor_fileno(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return descriptor_number(self);
}

static PyObject *
descriptor_text(PyObject *self)
{
    return PyUnicode_FromFormat("%d", ((descriptor *)self)->fd);
}

static PyObject *
descriptor_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    Py_INCREF(self);
    return self;
}

static PyObject *
descriptor_exit(PyObject *self, PyObject *Py_UNUSED(args))
{
    return descriptor_close(self, NULL);
}

static PyMethodDef descriptor_methods[] = {
    {"close", descriptor_close, METH_NOARGS,
     "close() -> None\n\nclose(2), unless that is done, or the number is "
     "another file's by now."},
    {"keep", descriptor_keep, METH_NOARGS,
     "keep() -> None\n\nClose it by close() only, from now on: the interpreter "
     "may end before the process."},
    {"fileno", descriptor_fileno, METH_NOARGS,
     "fileno() -> int\n\nThe number; -1 once it is closed."},
    {"__enter__", descriptor_enter, METH_NOARGS, NULL},
    {"__exit__", descriptor_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot descriptor_slots[] = {
    {Py_tp_doc,
     "An open file; os and fcntl take it for its number.  It is "
     "closed with the object."},
    {Py_tp_dealloc, descriptor_dealloc},
    {Py_tp_methods, descriptor_methods},
    {Py_tp_str, descriptor_text},
    {Py_nb_index, descriptor_number},
    {0, NULL},
};

PyType_Spec descriptor_spec = {
    .name = "page_primer._core.Descriptor",
    .basicsize = sizeof(descriptor),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = descriptor_slots,
};

PyDoc_STRVAR(
    opened_doc,
    "opened(function, ...) -> Descriptor\n\n"
    "Call a function that returns a new descriptor's number: os.open, os.dup.");

static PyObject *
core_opened(PyObject *module, PyObject *args, PyObject *named)
{
    core_state *state = PyModule_GetState(module);
    PyObject *function = NULL, *rest, *number = NULL;
    descriptor *self;
    struct stat found;

    if (PyTuple_Size(args) > 0)
        function = PyTuple_GetItem(args, 0);
    if (function == NULL) {
        PyErr_SetString(PyExc_TypeError, "opened() takes a function");
        return NULL;
    }
    rest = PyTuple_GetSlice(args, 1, PyTuple_Size(args));
    if (rest == NULL)
        return NULL;
    self = PyObject_New(
        descriptor,
        (PyTypeObject *)state->descriptor); /* before there is a file */
    if (self != NULL) {
        self->fd = -1;
        self->kept = false;
        number = PyObject_Call(function, rest, named);
    }
    Py_DECREF(rest);
    if (number != NULL) {
        long fd = PyLong_AsLong(number);
        Py_DECREF(number);
        if (fd == (int)fd && fd >= 0)
            self->fd = (int)fd;
        else if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "not a descriptor");
    }
    if (PyErr_Occurred()) {
        Py_XDECREF((PyObject *)self);
        return NULL;
    }
    self->known = fstat(self->fd, &found) == 0;
    if (self->known) {
        self->device = found.st_dev;
        self->inode = found.st_ino;
    }
    return (PyObject *)self;
}

PyMethodDef page_primer_descriptor_methods[] = {
    {"opened", (PyCFunction)(void (*)(void))core_opened,
     METH_VARARGS | METH_KEYWORDS, opened_doc},
    {NULL, NULL, 0, NULL},
};
