/* page_primer._core: the mechanism, and the only code of page-primer that
 * touches the address space.  It decides nothing: which ranges, in which
 * order, from which memory, is the caller's business (plan.py, apply.py).
 *
 * Every failure of a system call is a page_primer._core.Error, an OSError
 * that carries the errno, the step that failed and the address range it was
 * working on, so that a report can say exactly what happened where.
 */

#define _GNU_SOURCE
#include <pyconfig.h> /* says whether this is a free-threaded build */
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include "_core.h"

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In the stable ABI, but in no header for that of 3.10. */
#ifndef PyBUF_READ
#define PyBUF_READ 0x100
#endif

/* Numbers that the C library's headers may be too old to have. */
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#ifndef PR_GET_MDWE
#define PR_GET_MDWE 66
#endif

typedef struct {
    PyObject *error; /* page_primer._core.Error */
} core_state;

/* The headers of 3.12 and newer leave the reference out of Py_RETURN_NONE, and
 * those of 3.13 changed what "#" means in formats; a module built with them for
 * the stable ABI of 3.10 must do neither.
 */
static PyObject *
none(void)
{
    Py_INCREF(Py_None);
    return Py_None;
}

/* ------------------------------------------------------------- errors --- */

/* Set _core.Error(errno, "step 0x..-0x..: strerror"), without a range where
 * there is none, with the attributes step, start and end; always returns NULL.
 */
static PyObject *
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
static int
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
static int
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
static int
parse_range(PyObject *args, const char *format, uint64_t *address,
            uint64_t *length)
{
    if (!PyArg_ParseTuple(args, format, to_uint64, address, to_uint64, length))
        return -1;
    return check_range(*address, *length);
}

/* --------------------------------------------- what the loader has mapped */

typedef struct {
    const char *name; /* in survey.names */
    uintptr_t base;
    const ElfW(Phdr) *headers; /* in survey.headers */
    size_t count;
} found_object;

/* Counted in a first pass, so that memory can be allocated without the
 * loader's lock, and filled in a second one, if that still fits.
 */
typedef struct {
    found_object *objects;
    ElfW(Phdr) *headers;
    char *names;
    size_t objects_room, headers_room, names_room;
    size_t objects_size, headers_size, names_size;
    unsigned long long adds, subs;
    uintptr_t vdso;
} survey;

/* Called with the loader's lock held: plain C, no Python, no allocation.
 * Counts everything, and stores what there is room for.
 */
static int
collect(struct dl_phdr_info *info, size_t size, void *data)
{
    survey *all = data;
    const char *name = info->dlpi_name ? info->dlpi_name : "";
    size_t length = strlen(name) + 1, count = info->dlpi_phnum;

    (void)size;
    all->adds = info->dlpi_adds;
    all->subs = info->dlpi_subs;
    /* The vdso's program headers follow its ELF header, which is where
     * AT_SYSINFO_EHDR points. */
    if (all->vdso != 0 && (uintptr_t)info->dlpi_phdr >= all->vdso
        && (uintptr_t)info->dlpi_phdr < all->vdso + 4096)
        return 0;
    if (all->objects_size < all->objects_room
        && all->headers_size + count <= all->headers_room
        && all->names_size + length <= all->names_room) {
        found_object *object = &all->objects[all->objects_size];
        object->base = info->dlpi_addr;
        object->count = count;
        object->name = memcpy(all->names + all->names_size, name, length);
        object->headers = memcpy(all->headers + all->headers_size,
                                 info->dlpi_phdr, count * sizeof(ElfW(Phdr)));
    }
    all->objects_size++;
    all->headers_size += count;
    all->names_size += length;
    return 0;
}

static void
forget(survey *all)
{
    free(all->objects);
    free(all->headers);
    free(all->names);
}

/* Survey into memory of the right size; 0, or -1 where there is none.  What
 * was loaded between the passes makes it count once more.
 */
static int
take_survey(survey *all)
{
    dl_iterate_phdr(collect, all);
    while (all->objects_size > all->objects_room
           || all->headers_size > all->headers_room
           || all->names_size > all->names_room) {
        forget(all);
        /* Some more of each: others may be loading libraries. */
        all->objects_room = all->objects_size + 8;
        all->headers_room = all->headers_size + 128;
        all->names_room = all->names_size + 1024;
        all->objects = calloc(all->objects_room, sizeof(*all->objects));
        all->headers = calloc(all->headers_room, sizeof(*all->headers));
        all->names = malloc(all->names_room);
        if (all->objects == NULL || all->headers == NULL || all->names == NULL)
            return -1;
        all->objects_size = all->headers_size = all->names_size = 0;
        dl_iterate_phdr(collect, all);
    }
    return 0;
}

PyDoc_STRVAR(
    objects_doc,
    "objects() -> (adds, subs, [(name, base, headers), ...])\n\n"
    "List the ELF objects the dynamic loader has mapped, in its order, the\n"
    "main program first and the vdso left out: the name it was loaded by\n"
    "(bytes, empty for the main program), its load bias, and its program header\n"
    "table as bytes.  adds and subs count the loads and unloads so far\n"
    "(dl_iterate_phdr(3)).");

static PyObject *
core_objects(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    survey all = {.vdso = getauxval(AT_SYSINFO_EHDR)};
    PyObject *list = NULL, *result = NULL;
    int failed;

    (void)module;
    Py_BEGIN_ALLOW_THREADS
    failed = take_survey(&all);
    Py_END_ALLOW_THREADS
    if (failed) {
        PyErr_NoMemory();
        goto done;
    }
    list = PyList_New(0);
    if (list == NULL)
        goto done;
    for (size_t i = 0; i < all.objects_size; i++) {
        const found_object *o = &all.objects[i];
        PyObject *item =
            Py_BuildValue("(yKN)", o->name, (unsigned long long)o->base,
                          PyBytes_FromStringAndSize(
                              (const char *)o->headers,
                              (Py_ssize_t)(o->count * sizeof(ElfW(Phdr)))));
        int appended = item == NULL ? -1 : PyList_Append(list, item);
        Py_XDECREF(item);
        if (appended < 0)
            goto done;
    }
    result = Py_BuildValue("(KKO)", all.adds, all.subs, list);
done:
    Py_XDECREF(list);
    forget(&all);
    return result;
}

static int
count_loads(struct dl_phdr_info *info, size_t size, void *data)
{
    unsigned long long *counts = data;

    (void)size;
    counts[0] = info->dlpi_adds;
    counts[1] = info->dlpi_subs;
    return 1;
}

PyDoc_STRVAR(
    loads_doc,
    "loads() -> (adds, subs)\n\n"
    "The dynamic loader's counters of loads and unloads, the cheap way to know\n"
    "that no library came or went.");

static PyObject *
core_loads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    unsigned long long counts[2] = {0, 0};

    (void)module;
    Py_BEGIN_ALLOW_THREADS
    dl_iterate_phdr(count_loads, counts);
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(KK)", counts[0], counts[1]);
}

PyDoc_STRVAR(
    interpreter_doc,
    "interpreter_address() -> int\n\n"
    "An address inside the code of the running interpreter: that of a C-API\n"
    "function, wherever it was linked.");

static PyObject *
core_interpreter_address(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    return PyLong_FromUnsignedLongLong((uintptr_t)&PyObject_GetAttr);
}

PyDoc_STRVAR(
    threads_doc,
    "threads() -> int\n\n"
    "The number of threads of this process: the link count of /proc/self/task\n"
    "less \".\" and \"..\" (proc(5)).");

static PyObject *
core_threads(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    struct stat st;

    if (stat("/proc/self/task", &st) < 0)
        return fail(module, errno, "threads", 0, 0);
    /* A /proc that does not count links (gVisor's) leaves at least us. */
    return PyLong_FromUnsignedLong(st.st_nlink > 2 ? st.st_nlink - 2 : 1);
}

/* -------------------------------------------- preparing memory elsewhere */

PyDoc_STRVAR(
    reserve_doc,
    "reserve(length, alignment, like) -> address\n\n"
    "Reserve address space that nothing uses, PROT_NONE, at an address equal to\n"
    "`like` modulo `alignment`, a power of two and at least a page.");

static PyObject *
core_reserve(PyObject *module, PyObject *args)
{
    uint64_t length, alignment, like;
    uintptr_t area, start;
    void *got;

    if (!PyArg_ParseTuple(args, "O&O&O&:reserve", to_uint64, &length,
                          to_uint64, &alignment, to_uint64, &like)
        || check_range(alignment, length) < 0)
        return NULL;
    if (alignment < (uint64_t)sysconf(_SC_PAGESIZE)
        || (alignment & (alignment - 1)) != 0) {
        PyErr_SetString(PyExc_ValueError,
                        "alignment must be a power of two, at least a page");
        return NULL;
    }
    got = mmap(NULL, length + alignment, PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return fail(module, errno, "reserve", 0, length + alignment);
    area = (uintptr_t)got;
    start = area + ((like - area) & (alignment - 1));
    if (start > area)
        munmap((void *)area, start - area);
    if (area + alignment > start)
        munmap((void *)(start + length), area + alignment - start);
    return PyLong_FromUnsignedLongLong(start);
}

PyDoc_STRVAR(
    map_doc,
    "map(address, length, protection, flags, fd, offset) -> None\n\n"
    "mmap(2) with MAP_FIXED at an address that reserve() gave, or, with\n"
    "MAP_FIXED_NOREPLACE, at one that nothing uses (EEXIST).  When the former fails,\n"
    "the range may be nobody's any more (Linux before 6.12 unmaps before its last\n"
    "checks), and soon somebody else's: never unmap it then.");

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
    if (!(flags & MAP_FIXED_NOREPLACE))
        flags |= MAP_FIXED;
    Py_BEGIN_ALLOW_THREADS
    got = mmap(wanted, length, protection, flags, fd, (off_t)offset);
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
    "Read `length` bytes of a file into memory that map() made writable; what\n"
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
    "Memory that map() made readable, as a read-only buffer for system calls.  It\n"
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

/* MADV_POPULATE_READ answers with an error where a plain read would end in
 * SIGBUS (a file cut short, a bad disk, a huge page refused by a cgroup).
 * Kernels before 5.14 do not know it: there the pages are read one by one.
 */
static int
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
        (void)*((volatile char *)address + i);
    return 0;
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
    if (check_range(address - size, size) < 0)
        return NULL;
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

PyDoc_STRVAR(
    populate_doc,
    "populate(address, length) -> None\n\n"
    "Fault the pages in for reading: MADV_POPULATE_READ, or a read of every page\n"
    "before Linux 5.14.");

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

/* ------------------------------------------------------------- the swap --- */

/* One contiguous range with one protection. */
typedef struct {
    uintptr_t target; /* the live range */
    size_t length;
    int protection;
    uintptr_t source; /* where the replacement is mapped already */
    int fd;           /* map this file, or -1: move the source */
    off_t offset;
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
 * lock, where the alternative is a crash.
 */
static int
put_back(swap *s)
{
    for (size_t i = 0; i < s->undo_count; i++) {
        piece *u = &s->undo[i];
        int tries = 0;
        while (mmap((void *)u->target, u->length, u->protection,
                    MAP_PRIVATE | MAP_FIXED, u->fd, u->offset)
               == MAP_FAILED)
            if (++tries == 1000)
                return errno;
            else
                usleep(100);
    }
    return 0;
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

    /* 2. The replacement is what is in memory, byte for byte.  Both sides
     * are faulted in first (as the caller has done already, so that this
     * does not wait for a disk): an unreadable page is an error here and not
     * a signal.  A file that is cut short from here on is a SIGBUS: for the
     * object's own file that is so at any time, and whoever may write to an
     * image may send us signals. */
    for (size_t i = 0; i < s->count; i++) {
        piece *p = &s->pieces[i];
        ssize_t at;
        if (populate((void *)p->target, p->length) < 0
            || populate((void *)p->source, p->length) < 0) {
            swap_failed(s, errno, "populate", p->target,
                        p->target + p->length);
            return 1;
        }
        at = difference((const char *)p->target, (const char *)p->source,
                        p->length);
        if (at >= 0) {
            swap_failed(s, EILSEQ, "compare", p->target + at,
                        p->target + p->length);
            return 1;
        }
    }

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
        PyObject *item = PySequence_GetItem(sequence, i);
        if (item == NULL)
            return -1;
        ok = PyArg_ParseTuple(item, "O&O&iO&iO&", to_uint64, &target,
                              to_uint64, &length, &protection, to_uint64,
                              &source, &fd, to_uint64, &offset)
            && check_range(target, length) == 0
            && check_range(source, length) == 0;
        Py_DECREF(item);
        if (!ok)
            return -1;
        (*pieces)[i] =
            (piece){target, length, protection, source, fd, (off_t)offset};
    }
    return 0;
}

PyDoc_STRVAR(
    swap_doc,
    "swap(base, headers, pieces, undo) -> None\n\n"
    "Replace ranges of one loaded object by identical memory, inside\n"
    "dl_iterate_phdr's callback, so that nobody can unload the object meanwhile.\n"
    "base and headers are what objects() said of it.  A piece is (target, length,\n"
    "protection, source, fd, offset): the live range, and where its replacement\n"
    "is mapped for comparison; it is then mapped from fd at offset (MAP_PRIVATE),\n"
    "or with fd -1 the source itself is moved.  undo has the same form (source is\n"
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
    dl_iterate_phdr(swap_object, &s);
    Py_END_ALLOW_THREADS

    if (!s.found)
        fail(module, ESTALE, "check", base, base);
    else if (s.broken)
        fail(module, s.broken, "undo", s.start, s.end);
    else if (s.number)
        fail(module, s.number, s.step, s.start, s.end);
    else
        result = none();
done:
    free(s.pieces);
    free(s.undo);
    return result;
}

/* ----------------------------------------------------------- questions --- */

PyDoc_STRVAR(
    thp_disabled_doc,
    "thp_disabled() -> bool\n\n"
    "Whether PR_SET_THP_DISABLE is in force (prctl(2)).  With the flag\n"
    "PR_THP_DISABLE_EXCEPT_ADVISED (Linux 6.18) it does not concern us, who\n"
    "advise.");

static PyObject *
core_thp_disabled(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    int got = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);

    if (got < 0)
        return fail(module, errno, "PR_GET_THP_DISABLE", 0, 0);
    return PyBool_FromLong(got == 1);
}

PyDoc_STRVAR(
    mdwe_doc,
    "mdwe() -> int\n\n"
    "PR_GET_MDWE: the memory-deny-write-execute flags in force (Linux 6.3).");

static PyObject *
core_mdwe(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    int got = prctl(PR_GET_MDWE, 0, 0, 0, 0);

    if (got < 0)
        return fail(module, errno, "PR_GET_MDWE", 0, 0);
    return PyLong_FromLong(got);
}

PyDoc_STRVAR(
    limit_doc,
    "limit(resource) -> int or None\n\n"
    "The soft limit of getrlimit(2), None where there is none.  (The module\n"
    "resource would be one more library to load, to survey and to lock.)");

static PyObject *
core_limit(PyObject *module, PyObject *args)
{
    struct rlimit found;
    int which;

    if (!PyArg_ParseTuple(args, "i:limit", &which))
        return NULL;
    if (getrlimit(which, &found) < 0)
        return fail(module, errno, "getrlimit", 0, 0);
    if (found.rlim_cur == RLIM_INFINITY)
        return none();
    return PyLong_FromUnsignedLongLong(found.rlim_cur);
}

/* -------------------------------------------------------------- module --- */

static PyMethodDef core_methods[] = {
    {"objects", core_objects, METH_NOARGS, objects_doc},
    {"loads", core_loads, METH_NOARGS, loads_doc},
    {"interpreter_address", core_interpreter_address, METH_NOARGS,
     interpreter_doc},
    {"threads", core_threads, METH_NOARGS, threads_doc},
    {"reserve", core_reserve, METH_VARARGS, reserve_doc},
    {"map", core_map, METH_VARARGS, map_doc},
    {"memfd", core_memfd, METH_VARARGS, memfd_doc},
    {"fill", core_fill, METH_VARARGS, fill_doc},
    {"view", core_view, METH_VARARGS, view_doc},
    {"unmap", core_unmap, METH_VARARGS, unmap_doc},
    {"protect", core_protect, METH_VARARGS, protect_doc},
    {"advise", core_advise, METH_VARARGS, advise_doc},
    {"dump_page", core_dump_page, METH_VARARGS, dump_page_doc},
    {"dump_before", core_dump_before, METH_VARARGS, dump_before_doc},
    {"populate", core_populate, METH_VARARGS, populate_doc},
    {"lock", core_lock, METH_VARARGS, lock_doc},
    {"unlock", core_unlock, METH_VARARGS, unlock_doc},
    {"swap", core_swap, METH_VARARGS, swap_doc},
    {"thp_disabled", core_thp_disabled, METH_NOARGS, thp_disabled_doc},
    {"mdwe", core_mdwe, METH_NOARGS, mdwe_doc},
    {"limit", core_limit, METH_VARARGS, limit_doc},
    {NULL, NULL, 0, NULL},
};

static int
core_exec(PyObject *module)
{
    core_state *state = PyModule_GetState(module);

    if (PyModule_AddFunctions(module, page_primer_heap_methods) < 0
        || PyModule_AddFunctions(module, page_primer_alone_methods) < 0)
        return -1;
    state->error =
        PyErr_NewException("page_primer._core.Error", PyExc_OSError, NULL);
    if (state->error == NULL)
        return -1;
    Py_INCREF(state->error);
    if (PyModule_AddObject(module, "Error", state->error) < 0) {
        Py_DECREF(state->error);
        return -1;
    }
    if (PyModule_AddIntMacro(module, PROT_NONE) < 0
        || PyModule_AddIntMacro(module, PROT_READ) < 0
        || PyModule_AddIntMacro(module, PROT_WRITE) < 0
        || PyModule_AddIntMacro(module, PROT_EXEC) < 0
        || PyModule_AddIntMacro(module, MAP_PRIVATE) < 0
        || PyModule_AddIntMacro(module, MAP_SHARED) < 0
        || PyModule_AddIntMacro(module, MAP_ANONYMOUS) < 0
        || PyModule_AddIntMacro(module, MAP_NORESERVE) < 0
        || PyModule_AddIntMacro(module, MAP_POPULATE) < 0
        || PyModule_AddIntMacro(module, MAP_FIXED_NOREPLACE) < 0
        || PyModule_AddIntMacro(module, MADV_HUGEPAGE) < 0
        || PyModule_AddIntMacro(module, MADV_COLLAPSE) < 0
        || PyModule_AddIntMacro(module, MADV_POPULATE_READ) < 0
        || PyModule_AddIntMacro(module, MADV_POPULATE_WRITE) < 0
        || PyModule_AddIntMacro(module, MLOCK_ONFAULT) < 0
        || PyModule_AddIntMacro(module, RLIMIT_MEMLOCK) < 0
        || PyModule_AddIntMacro(module, RLIMIT_FSIZE) < 0)
        return -1;
    return 0;
}

static int
core_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = PyModule_GetState(module);

    if (state != NULL)
        Py_VISIT(state->error);
    return 0;
}

static int
core_clear(PyObject *module)
{
    core_state *state = PyModule_GetState(module);

    if (state != NULL)
        Py_CLEAR(state->error);
    return 0;
}

/* No state but the exception class, and every function is one system call
 * or takes the loader's lock: nothing needs the GIL, or the main interpreter.
 * What is primed is the process's: apply.py keeps that book in the interpreter
 * that primed.
 *
 * Numbers and values of slots that the headers for the stable ABI of 3.10 do
 * not have; interpreters before these versions refuse slots they do not know,
 * so which ones count is decided when the module is loaded.
 */
#define SLOT_MULTIPLE_INTERPRETERS 3 /* 3.12 */
#define PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#define SLOT_GIL 4 /* 3.13 */
#define GIL_NOT_USED ((void *)1)

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
    {0, NULL}, /* 3.12 and newer: own GIL */
    {0, NULL}, /* 3.13 and newer: no GIL */
    {0, NULL},
};

PyDoc_STRVAR(
    core_doc,
    "Mechanism of page_primer: ELF objects, mappings, the swap, locking.\n"
    "Private: addresses are not checked.");

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,       .m_name = "page_primer._core",
    .m_doc = core_doc,           .m_size = sizeof(core_state),
    .m_methods = core_methods,   .m_slots = core_slots,
    .m_traverse = core_traverse, .m_clear = core_clear,
};

/* Whether the running interpreter is 3.`minor` or newer. */
static int
is_since(long minor)
{
    char *rest;
    long major = strtol(Py_GetVersion(), &rest, 10);

    return major > 3 || (*rest == '.' && strtol(rest + 1, NULL, 10) >= minor);
}

PyMODINIT_FUNC
PyInit__core(void)
{
    /* The same values whoever comes first: every interpreter of a process is
     * of one version. */
    if (is_since(12))
        core_slots[1] = (PyModuleDef_Slot){SLOT_MULTIPLE_INTERPRETERS,
                                           PER_INTERPRETER_GIL_SUPPORTED};
    if (is_since(13))
        core_slots[2] = (PyModuleDef_Slot){SLOT_GIL, GIL_NOT_USED};
    return PyModuleDef_Init(&core_module);
}
