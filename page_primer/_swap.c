/* page_primer._core: the swap, one object at a time, under the loader's lock. */

#include "_core.h"

#include <errno.h>
#include <link.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* One contiguous range with one protection. */
typedef struct {
    uintptr_t target; /* the live range */
    size_t length;
    int protection;
    uintptr_t source; /* where the replacement is mapped already */
    int fd;           /* map this file, or -1: move the source */
    off_t offset;
    PyObject *owner; /* of the source */
    bool moved;      /* so it is */
} piece;

typedef struct {
    uintptr_t base;
    const char *headers;
    size_t headers_size;
    piece *pieces, *undo;
    size_t count, undo_count;
    /* the outcome */
    int found, number, broken;
    const char *step;
    uintptr_t start, end;
} swap;

/* The offset of the first byte that differs, or -1. */
static ssize_t
difference(const char *a, const char *b, size_t length)
{
    const size_t block = 4096;

    for (size_t i = 0; i < length; i += block) {
        size_t n = length - i < block ? length - i : block;
        if (memcmp(a + i, b + i, n) != 0) {
            while (a[i] == b[i])
                i++;
            return (ssize_t)i;
        }
    }
    return -1;
}

static void
swap_failed(swap *s, int number, const char *step, uintptr_t start,
            uintptr_t end)
{
    s->number = number;
    s->step = step;
    s->start = start;
    s->end = end;
}

/* Map everything as it was again.  A hole in running code is the one thing
 * that cannot be left behind, so this tries for as long as memory for a
 * mapping may still turn up: the one place that sleeps under the loader's
 * lock, where the alternative is a crash.  What cannot be mapped is no reason
 * to leave out the rest.  Returns the first error, or 0.
 */
static int
put_back(swap *s)
{
    int first = 0;

    for (size_t i = 0; i < s->undo_count; i++) {
        piece *u = &s->undo[i];
        int tries = 0;
        while (mmap((void *)u->target, u->length, u->protection,
                    MAP_PRIVATE | MAP_FIXED, u->fd, u->offset)
               == MAP_FAILED) {
            if (++tries == 1000) {
                first = first ? first : errno;
                break;
            }
            usleep(100);
        }
    }
    return first;
}

/* Whether the replacement is what is in memory, byte for byte.  Both sides are
 * faulted in first (as the caller has done already, so that this does not wait
 * for a disk): an unreadable page is an error here and not a signal.  A file
 * that is cut short from here on is a SIGBUS: for the object's own file that is
 * so at any time, and whoever may write to an image may send us signals.  A
 * page that is made unreadable from here on is a SIGSEGV, as for whoever
 * executes it.
 */
static bool
is_same(swap *s)
{
    for (size_t i = 0; i < s->count; i++) {
        piece *p = &s->pieces[i];
        ssize_t at;
        if (populate((void *)p->target, p->length) < 0
            || populate((void *)p->source, p->length) < 0) {
            swap_failed(s, errno, "populate", p->target,
                        p->target + p->length);
            return false;
        }
        at = difference((const char *)p->target, (const char *)p->source,
                        p->length);
        if (at >= 0) {
            swap_failed(s, EILSEQ, "compare", p->target + at,
                        p->target + p->length);
            return false;
        }
    }
    return true;
}

static int
swap_object(struct dl_phdr_info *info, size_t size, void *data)
{
    swap *s = data;

    (void)size;
    /* 1. The object is the one that was surveyed. */
    if (info->dlpi_addr != s->base
        || info->dlpi_phnum * sizeof(ElfW(Phdr)) != s->headers_size
        || memcmp(info->dlpi_phdr, s->headers, s->headers_size) != 0)
        return 0;
    s->found = 1;

    /* 2. The replacement is what it is to replace. */
    if (!is_same(s))
        return 1;

    /* 3. Replace, one system call a piece: the kernel holds the address
     * space's lock from taking the old mapping out to putting the new one
     * in, so a thread that executes there waits and never sees a hole. */
    for (size_t i = 0; i < s->count; i++) {
        piece *p = &s->pieces[i];
        void *got;
        if (p->fd >= 0)
            got = mmap((void *)p->target, p->length, p->protection,
                       MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, p->fd,
                       p->offset);
        else
            got = mremap((void *)p->source, p->length, p->length,
                         MREMAP_MAYMOVE | MREMAP_FIXED, (void *)p->target);
        if (got == MAP_FAILED) {
            swap_failed(s, errno, "replace", p->target, p->target + p->length);
            s->broken = put_back(s);
            return 1;
        }
        p->moved = p->fd < 0;
    }

    /* 4. Map the new pages while the object cannot go away. */
    for (size_t i = 0; i < s->count; i++)
        (void)populate((void *)s->pieces[i].target, s->pieces[i].length);
    return 1;
}

static int
parse_pieces(PyObject *sequence, piece **pieces, size_t *count)
{
    Py_ssize_t n = PySequence_Size(sequence);

    if (n < 0)
        return -1;
    *pieces = calloc(n ? (size_t)n : 1, sizeof(piece));
    if (*pieces == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    *count = (size_t)n;
    for (Py_ssize_t i = 0; i < n; i++) {
        uint64_t target, length, source, offset;
        int protection, fd, ok;
        PyObject *owner, *item = PySequence_GetItem(sequence, i);
        if (item == NULL)
            return -1;
        ok = PyArg_ParseTuple(item, "O&O&iOiO&", to_uint64, &target, to_uint64,
                              &length, &protection, &owner, &fd, to_uint64,
                              &offset)
            && to_uint64(owner, &source) && check_range(target, length) == 0
            && check_range(source, length) == 0;
        if (ok) {
            Py_INCREF(owner);
            (*pieces)[i] = (piece){target, length,        protection, source,
                                   fd,     (off_t)offset, owner,      false};
        }
        Py_DECREF(item);
        if (!ok)
            return -1;
    }
    return 0;
}

static void
free_pieces(piece *pieces, size_t count)
{
    for (size_t i = 0; i < count; i++)
        Py_XDECREF(pieces[i].owner);
    free(pieces);
}

PyDoc_STRVAR(
    swap_doc,
    "swap(base, headers, pieces, undo) -> None\n\n"
    "Replace ranges of one loaded object by identical memory, inside\n"
    "dl_iterate_phdr's callback, so that nobody can unload the object meanwhile.\n"
    "base and headers are what objects() said of it.  A piece is (target, length,\n"
    "protection, source, fd, offset): the live range, and where its replacement\n"
    "is mapped for comparison; it is then mapped from fd at offset (MAP_PRIVATE),\n"
    "or with fd -1 the source itself is moved, and its Area, if the source is one,\n"
    "owns that no longer.  undo has the same form (source is\n"
    "not used): mappings that put the object back as it was, made should a\n"
    "replacement fail.\n\n"
    "Error.step says how far it came: 'check' (object gone or another), 'populate'\n"
    "(unreadable), 'compare' (differs at Error.start), 'replace' (put back), in\n"
    "all of which the object is as it was; 'undo' (could not be put back).");

static PyObject *
core_swap(PyObject *module, PyObject *args)
{
    swap s = {0};
    uint64_t base;
    Py_ssize_t headers_size;
    char *data;
    PyObject *headers, *pieces, *undo, *result = NULL;

    if (!PyArg_ParseTuple(args, "O&SOO:swap", to_uint64, &base, &headers,
                          &pieces, &undo)
        || PyBytes_AsStringAndSize(headers, &data, &headers_size) < 0)
        return NULL;
    s.base = base;
    s.headers = data;
    s.headers_size = (size_t)headers_size;
    if (parse_pieces(pieces, &s.pieces, &s.count) < 0
        || parse_pieces(undo, &s.undo, &s.undo_count) < 0)
        goto done;

    /* Without the GIL: a thread inside dlopen may hold the loader's lock and
     * wait for the GIL. */
    Py_BEGIN_ALLOW_THREADS
    enter_loader();
    dl_iterate_phdr(swap_object, &s);
    leave_loader();
    Py_END_ALLOW_THREADS

    for (size_t i = 0; i < s.count; i++)
        if (s.pieces[i].moved)
            area_moved(module, s.pieces[i].owner, s.pieces[i].length);
    if (!s.found)
        fail(module, ESTALE, "check", base, base);
    else if (s.broken)
        fail(module, s.broken, "undo", s.start, s.end);
    else if (s.number)
        fail(module, s.number, s.step, s.start, s.end);
    else
        result = none();
done:
    free_pieces(s.pieces, s.count);
    free_pieces(s.undo, s.undo_count);
    return result;
}

PyMethodDef page_primer_swap_methods[] = {
    {"swap", core_swap, METH_VARARGS, swap_doc},
    {NULL, NULL, 0, NULL},
};
