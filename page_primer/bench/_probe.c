/* Chase pointers over small and over huge pages: nanoseconds an access.
 *
 * One pointer a page, at a random line of it, in random order.  Where a
 * hypervisor backs this machine's memory with small pages, what the guest maps
 * huge has no huge TLB entry, and the gain that is left is a shorter walk.
 */

#define PY_SSIZE_T_CLEAN
#include <pyconfig.h> /* says whether this is a free-threaded build */
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030a0000
#endif
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <Python.h>

#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, LINE = 64 };

static const size_t HUGE_PAGE = 2 << 20;

/* So that the compiler cannot leave the loop out. */
static char **volatile end_of_chase;

static uint64_t
random_number(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* Links the pages in one cycle of random order; returns its first pointer. */
static char **
link_pages(char *start, size_t pages, char **slots)
{
    uint64_t state = 88172645463325252ULL;

    for (size_t i = 0; i < pages; i++)
        slots[i] =
            start + i * PAGE + random_number(&state) % (PAGE / LINE) * LINE;
    for (size_t i = pages - 1; i > 0; i--) {
        size_t other = random_number(&state) % (i + 1);
        char *swapped = slots[i];
        slots[i] = slots[other];
        slots[other] = swapped;
    }
    for (size_t i = 0; i < pages; i++)
        *(char **)slots[i] = slots[(i + 1) % pages];
    return (char **)slots[0];
}

/* Returns nanoseconds of processor time an access, which a busy machine does
 * not change much; negative where memory is short. */
static double
chase(size_t pages, int advice, size_t accesses)
{
    size_t size = pages * PAGE;
    char *area = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char **slots = (char **)calloc(pages, sizeof(*slots));
    struct timespec from, to;
    char **at;

    if (area == MAP_FAILED || slots == NULL) {
        if (area != MAP_FAILED)
            munmap(area, size + HUGE_PAGE);
        free((void *)slots);
        return -1;
    }
    char *start =
        (char *)(((uintptr_t)area + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
    madvise(start, size, advice);
    at = link_pages(start, pages, slots);
    for (size_t i = 0; i < pages; i++)
        at = (char **)*at;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
    for (size_t i = 0; i < accesses; i++)
        at = (char **)*at;
    end_of_chase = at;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
    munmap(area, size + HUGE_PAGE);
    free((void *)slots);
    return ((double)(to.tv_sec - from.tv_sec) * 1e9
            + (double)(to.tv_nsec - from.tv_nsec))
        / (double)accesses;
}

PyDoc_STRVAR(pointer_chase_doc,
             "pointer_chase(pages, huge, accesses)\n--\n\n"
             "Nanoseconds an access to one of so many pages of 4 KiB, in\n"
             "memory that is advised to be on small or on huge pages.");

static PyObject *
pointer_chase(PyObject *module, PyObject *args)
{
    Py_ssize_t pages, accesses;
    int huge;
    double found;

    (void)module;
    if (!PyArg_ParseTuple(args, "npn:pointer_chase", &pages, &huge, &accesses))
        return NULL;
    if (pages < 2 || pages > 1 << 24 || accesses < 1)
        return PyErr_Format(PyExc_ValueError,
                            "pages or accesses out of range");
    Py_BEGIN_ALLOW_THREADS
    found = chase((size_t)pages, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE,
                  (size_t)accesses);
    Py_END_ALLOW_THREADS
    return found < 0 ? PyErr_NoMemory() : PyFloat_FromDouble(found);
}

static PyMethodDef methods[] = {
    {"pointer_chase", pointer_chase, METH_VARARGS, pointer_chase_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "page_primer.bench._probe",
    .m_doc = "How fast memory on small and on huge pages is.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit__probe(void)
{
    return PyModuleDef_Init(&definition);
}
