/* page_primer._core: pages faulted in for reading, never by a signal. */

#include "_core.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* A number that the C library's headers may be too old to have. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* Have the kernel read a page, which answers with an error where a read of our
 * own would be a signal.  It copies the set before it looks at what is to be
 * done with it, which is nothing that it knows: EINVAL.
 */
static int
read_page(const char *page)
{
    const int nothing = ~0;
    const size_t set = 8; /* bytes, the kernel's sigset_t */

    if (syscall(SYS_rt_sigprocmask, nothing, page, NULL, set) != 0
        && errno != EINVAL)
        return -1;
    return 0;
}

/* MADV_POPULATE_READ answers with an error where a plain read would end in a
 * signal: SIGBUS (a file cut short, a bad disk, a huge page refused by a
 * cgroup), or SIGSEGV.  EINVAL says either that a page may not be read, or
 * that the kernel does not know the advice (before 5.14, and gVisor): the
 * pages are read one by one.
 */
int
populate(void *address, size_t length)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    for (int tries = 0; tries < 8; tries++) {
        if (madvise(address, length, MADV_POPULATE_READ) == 0)
            return 0;
        if (errno != EAGAIN && errno != EINTR)
            break;
    }
    if (errno != EINVAL)
        return -1;
    for (size_t i = 0; i < length; i += page)
        if (read_page((const char *)address + i) < 0)
            return -1;
    return 0;
}

PyDoc_STRVAR(
    populate_doc,
    "populate(address, length) -> None\n\n"
    "Fault the pages in for reading: MADV_POPULATE_READ, or, before Linux 5.14, a\n"
    "read of every page by the kernel.  One that cannot be read is an error.");

static PyObject *
core_populate(PyObject *module, PyObject *args)
{
    uint64_t address, length;
    int number = 0;

    if (parse_range(args, "O&O&:populate", &address, &length) < 0)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (populate((void *)address, length) != 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "populate", address, address + length);
    return none();
}

PyMethodDef page_primer_populate_methods[] = {
    {"populate", core_populate, METH_VARARGS, populate_doc},
    {NULL, NULL, 0, NULL},
};
