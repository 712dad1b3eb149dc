/* page_primer._core: what core files hold of a mapping. */

#include "_core.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

/* A number that the C library's headers may be too old to have. */
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

/* The kernel writes a private mapping of a file into a core file only if it
 * ever had a page of its own (vma_dump_size() in fs/coredump.c: anon_vma),
 * but for its first page if that is the file's. Write access is not to be
 * had for this (MDWE, SELinux's execmod), so a byte is written over itself
 * through /proc/self/mem, as debuggers do. */
static int
own_page(uintptr_t address)
{
    unsigned char byte;
    int number = 0;
    int fd = open("/proc/self/mem", O_RDWR | O_CLOEXEC);

    if (fd < 0)
        return errno;
    if (pread(fd, &byte, 1, (off_t)address) != 1
        || pwrite(fd, &byte, 1, (off_t)address) != 1)
        number = errno ? errno : EIO;
    close(fd);
    return number;
}

PyDoc_STRVAR(dump_page_doc,
             "dump_page(address) -> None\n\n"
             "Have the private file mapping of this page written into core\n"
             "files whole: give the process a copy of the page.");

static PyObject *
core_dump_page(PyObject *module, PyObject *args)
{
    uint64_t address, size = (uint64_t)sysconf(_SC_PAGESIZE);
    int number;

    if (!PyArg_ParseTuple(args, "O&:dump_page", to_uint64, &address)
        || check_range(address, size) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    number = own_page(address);
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "dump", address, address + size);
    return none();
}

PyDoc_STRVAR(
    dump_before_doc,
    "dump_before(address, protection, fd, offset) -> None\n\n"
    "The same for the mapping at `address` of the file `fd` at `offset`,\n"
    "without touching it: the page before it is mapped from the same file,\n"
    "which the kernel makes one mapping of, and unmapped. Nothing must be\n"
    "mapped there.");

static PyObject *
core_dump_before(PyObject *module, PyObject *args)
{
    uint64_t address, offset, size = (uint64_t)sysconf(_SC_PAGESIZE);
    int protection, fd, number = 0;
    void *wanted, *got;

    if (!PyArg_ParseTuple(args, "O&iiO&:dump_before", to_uint64, &address,
                          &protection, &fd, to_uint64, &offset))
        return NULL;
    if (address < size || offset < size) {
        PyErr_SetString(PyExc_ValueError, "nothing is before the first page");
        return NULL;
    }
    wanted = (void *)(uintptr_t)(address - size);
    /* The flags of core_swap(): the kernel would not merge others. */
    Py_BEGIN_ALLOW_THREADS
    got = mmap(wanted, size, protection,
               MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED_NOREPLACE, fd,
               (off_t)(offset - size));
    if (got == MAP_FAILED)
        number = errno;
    else {
        number = got == wanted ? own_page(address - size) : EEXIST;
        munmap(got, size);
    }
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "dump", address - size, address);
    return none();
}

PyMethodDef page_primer_dump_methods[] = {
    {"dump_page", core_dump_page, METH_VARARGS, dump_page_doc},
    {"dump_before", core_dump_before, METH_VARARGS, dump_before_doc},
    {NULL, NULL, 0, NULL},
};
