/* page_primer._core: memory, a function a system call. */

#include "_core.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In the stable ABI, but in no header for that of 3.10. */
#ifndef PyBUF_READ
#define PyBUF_READ 0x100
#endif

/* A number that the C library's headers may be too old to have. */
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

PyDoc_STRVAR(map_doc,
             "map(address, length, protection, flags, fd, offset) -> None\n\n"
             "mmap(2) with MAP_FIXED_NOREPLACE: where something is, EEXIST.");

static PyObject *
core_map(PyObject *module, PyObject *args)
{
    uint64_t address, length, offset;
    int protection, flags, fd, number = 0;
    void *wanted, *got;

    if (!PyArg_ParseTuple(args, "O&O&iiiO&:map", to_uint64, &address,
                          to_uint64, &length, &protection, &flags, &fd,
                          to_uint64, &offset)
        || check_range(address, length) < 0)
        return NULL;
    wanted = (void *)(uintptr_t)address;
    Py_BEGIN_ALLOW_THREADS
    got = mmap(wanted, length, protection, flags | MAP_FIXED_NOREPLACE, fd,
               (off_t)offset);
    if (got == MAP_FAILED)
        number = errno;
    else if (got != wanted) { /* Linux before 4.17: no more than a hint */
        munmap(got, length);
        number = EEXIST;
    }
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "map", address, address + length);
    return none();
}

PyDoc_STRVAR(
    fill_doc,
    "fill(address, length, fd, offset) -> None\n\n"
    "Read `length` bytes of a file into memory that was mapped writable; what\n"
    "lies beyond the end of the file stays as it is.");

static PyObject *
core_fill(PyObject *module, PyObject *args)
{
    uint64_t address, length, offset;
    size_t done = 0;
    int fd, number = 0;

    if (!PyArg_ParseTuple(args, "O&O&iO&:fill", to_uint64, &address, to_uint64,
                          &length, &fd, to_uint64, &offset)
        || check_range(address, length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    while (done < length) {
        ssize_t n = pread(fd, (char *)(uintptr_t)address + done, length - done,
                          (off_t)(offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            number = errno;
        if (n <= 0)
            break;
        done += n;
    }
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "fill", address, address + length);
    return none();
}

PyDoc_STRVAR(
    view_doc,
    "view(address, length) -> memoryview\n\n"
    "Memory that was mapped readable, as a read-only buffer for system calls.  It\n"
    "must be released before the range is unmapped.");

static PyObject *
core_view(PyObject *module, PyObject *args)
{
    uint64_t address, length;

    (void)module;
    if (parse_range(args, "O&O&:view", &address, &length) < 0)
        return NULL;
    if (length > PY_SSIZE_T_MAX) {
        PyErr_SetString(PyExc_OverflowError, "too long for a buffer");
        return NULL;
    }
    return PyMemoryView_FromMemory((char *)(uintptr_t)address,
                                   (Py_ssize_t)length, PyBUF_READ);
}

PyDoc_STRVAR(
    memfd_doc,
    "memfd(name, flags) -> fd\n\n"
    "memfd_create(2), which Pythons built for an old C library lack in os.");

static PyObject *
core_memfd(PyObject *module, PyObject *args)
{
    const char *name;
    unsigned int flags;
    long fd;

    if (!PyArg_ParseTuple(args, "yI:memfd", &name, &flags))
        return NULL;
    fd = syscall(SYS_memfd_create, name, flags);
    if (fd < 0)
        return fail(module, errno, "memfd_create", 0, 0);
    return PyLong_FromLong(fd);
}

PyDoc_STRVAR(unmap_doc, "unmap(address, length) -> None: munmap(2).");

static PyObject *
core_unmap(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int number = 0;

    if (parse_range(args, "O&O&:unmap", &address, &length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (munmap((void *)address, length) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "unmap", address, address + length);
    return none();
}

PyDoc_STRVAR(protect_doc,
             "protect(address, length, protection) -> None: mprotect(2).");

static PyObject *
core_protect(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int protection, number = 0;

    if (!PyArg_ParseTuple(args, "O&O&i:protect", to_uint64, &address,
                          to_uint64, &length, &protection)
        || check_range(address, length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (mprotect((void *)address, length, protection) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "protect", address, address + length);
    return none();
}

PyDoc_STRVAR(advise_doc,
             "advise(address, length, advice) -> None: madvise(2).");

static PyObject *
core_advise(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int advice, number = 0;

    if (!PyArg_ParseTuple(args, "O&O&i:advise", to_uint64, &address, to_uint64,
                          &length, &advice)
        || check_range(address, length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (madvise((void *)address, length, advice) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "advise", address, address + length);
    return none();
}

/* System calls, since AddressSanitizer makes the C library's functions do
 * nothing. */
static long
lock_pages(uint64_t address, uint64_t length, int flags)
{
    if (flags)
        return syscall(SYS_mlock2, address, length, flags);
    return syscall(SYS_mlock, address, length);
}

PyDoc_STRVAR(lock_doc,
             "lock(address, length, flags=0) -> None\n\n"
             "mlock(2), or mlock2(2) with flags (MLOCK_ONFAULT).");

static PyObject *
core_lock(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int flags = 0, number = 0;

    if (!PyArg_ParseTuple(args, "O&O&|i:lock", to_uint64, &address, to_uint64,
                          &length, &flags)
        || check_range(address, length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (lock_pages(address, length, flags) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "lock", address, address + length);
    return none();
}

PyDoc_STRVAR(unlock_doc, "unlock(address, length) -> None: munlock(2).");

static PyObject *
core_unlock(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int number = 0;

    if (parse_range(args, "O&O&:unlock", &address, &length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (syscall(SYS_munlock, address, length) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "unlock", address, address + length);
    return none();
}

PyMethodDef page_primer_memory_methods[] = {
    {"map", core_map, METH_VARARGS, map_doc},
    {"memfd", core_memfd, METH_VARARGS, memfd_doc},
    {"fill", core_fill, METH_VARARGS, fill_doc},
    {"view", core_view, METH_VARARGS, view_doc},
    {"unmap", core_unmap, METH_VARARGS, unmap_doc},
    {"protect", core_protect, METH_VARARGS, protect_doc},
    {"advise", core_advise, METH_VARARGS, advise_doc},
    {"lock", core_lock, METH_VARARGS, lock_doc},
    {"unlock", core_unlock, METH_VARARGS, unlock_doc},
    {NULL, NULL, 0, NULL},
};
