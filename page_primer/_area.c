/* page_primer._core: address space that somebody owns; see _descriptor.c. */

#include "_core.h"

#include <errno.h>
#include <stddef.h>
#include <structmember.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    PyObject_HEAD unsigned long long address;
    uint64_t low, high; /* what of it is still owned */
} area;

static int
unmap_once(area *self)
{
    uint64_t low = self->low;
    int number = 0;

    if (low >= self->high)
        return 0;
    self->low = self->high;
    Py_BEGIN_ALLOW_THREADS
    if (munmap((void *)(uintptr_t)low, self->high - low) < 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number == 0)
        return 0;
    self->low = low;
    errno = number;
    return -1;
}

static void
area_dealloc(PyObject *self)
{
    (void)unmap_once((area *)self);
    free_object(self);
}

/* The first bytes are nobody's any more. */
static void
lose(area *self, uint64_t length)
{
    if (self->low < self->address + length)
        self->low = self->address + length;
}

/* Of a source of a swap, if it is an area: mremap(2) has moved it. */
void
area_moved(PyObject *module, PyObject *source, uint64_t length)
{
    core_state *state = PyModule_GetState(module);

    if (PyObject_TypeCheck(source, (PyTypeObject *)state->area))
        lose((area *)source, length);
}

PyDoc_STRVAR(
    area_map_doc,
    "map(length, protection, flags, fd, offset) -> None\n\n"
    "mmap(2) with MAP_FIXED at its beginning.  When that fails, the range may be\n"
    "nobody's any more (Linux before 6.12 unmaps before its last checks), and soon\n"
    "somebody else's: then it is owned no longer.");

static PyObject *
area_map(PyObject *object, PyObject *args)
{
    area *self = (area *)object;
    uint64_t length, offset;
    int protection, flags, fd, number = 0;
    void *place = (void *)(uintptr_t)self->address;

    if (!PyArg_ParseTuple(args, "O&iiiO&:map", to_uint64, &length, &protection,
                          &flags, &fd, to_uint64, &offset))
        return NULL;
    if (self->low != self->address || length > self->high - self->low) {
        PyErr_SetString(PyExc_ValueError, "not within the area");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    if (mmap(place, length, protection, flags | MAP_FIXED, fd, (off_t)offset)
        == MAP_FAILED)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number == 0)
        return none();
    /* These come before the kernel touches the range. */
    if (number != EPERM && number != EACCES && number != EBADF)
        lose(self, length);
    return fail(PyType_GetModule(Py_TYPE(object)), number, "map",
                self->address, self->address + length);
}

static PyObject *
area_unmap(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    area *self = (area *)object;

    if (unmap_once(self) < 0)
        return fail(PyType_GetModule(Py_TYPE(object)), errno, "unmap",
                    self->low, self->high);
    return none();
}

static PyObject *
area_index(PyObject *self)
{
    return PyLong_FromUnsignedLongLong(((area *)self)->address);
}

static PyMethodDef area_methods[] = {
    {"map", area_map, METH_VARARGS, area_map_doc},
    {"unmap", area_unmap, METH_NOARGS,
     "unmap() -> None\n\nmunmap(2) what of it is still owned."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef area_members[] = {
    {"address", T_ULONGLONG, offsetof(area, address), READONLY,
     "Where it begins, or began."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot area_slots[] = {
    {Py_tp_doc,
     "Address space that was reserved, and what is mapped there.  "
     "It is unmapped with the object."},
    {Py_tp_dealloc, area_dealloc},
    {Py_tp_methods, area_methods},
    {Py_tp_members, area_members},
    {Py_nb_index, area_index},
    {0, NULL},
};

PyType_Spec area_spec = {
    .name = "page_primer._core.Area",
    .basicsize = sizeof(area),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = area_slots,
};

PyDoc_STRVAR(
    reserve_doc,
    "reserve(length, alignment, like) -> Area\n\n"
    "Reserve address space that nothing uses, PROT_NONE, at an address equal to\n"
    "`like` modulo `alignment`, a power of two and at least a page.  The length is\n"
    "rounded up to whole pages.");

static PyObject *
core_reserve(PyObject *module, PyObject *args)
{
    core_state *state = PyModule_GetState(module);
    uint64_t length, alignment, like, start, page = sysconf(_SC_PAGESIZE);
    area *self;
    void *got;

    if (!PyArg_ParseTuple(args, "O&O&O&:reserve", to_uint64, &length,
                          to_uint64, &alignment, to_uint64, &like)
        || check_range(alignment, length) < 0
        || check_range(alignment + length, page) < 0)
        return NULL;
    if (alignment < page || (alignment & (alignment - 1)) != 0) {
        PyErr_SetString(PyExc_ValueError,
                        "alignment must be a power of two, at least a page");
        return NULL;
    }
    length = (length + page - 1) & ~(page - 1);
    self = PyObject_New(
        area, (PyTypeObject *)state->area); /* before there is a range */
    if (self == NULL)
        return NULL;
    self->address = self->low = self->high = 0;
    got = mmap(NULL, length + alignment, PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED) {
        fail(module, errno, "reserve", 0, length + alignment);
        Py_DECREF((PyObject *)self);
        return NULL;
    }
    self->low = (uintptr_t)got;
    self->high = self->low + length + alignment;
    start = self->low + ((like - self->low) & (alignment - 1));
    if (start > self->low)
        munmap(got, start - self->low);
    munmap((void *)(uintptr_t)(start + length), self->high - start - length);
    self->address = self->low = start;
    self->high = start + length;
    return (PyObject *)self;
}

PyMethodDef page_primer_area_methods[] = {
    {"reserve", core_reserve, METH_VARARGS, reserve_doc},
    {NULL, NULL, 0, NULL},
};
