/* page_primer._core: what the dynamic loader has mapped, and where. */

#include "_core.h"

#include <errno.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/stat.h>

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
    enter_loader();
    dl_iterate_phdr(collect, all);
    leave_loader();
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
        enter_loader();
        dl_iterate_phdr(collect, all);
        leave_loader();
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
    enter_loader();
    dl_iterate_phdr(count_loads, counts);
    leave_loader();
    Py_END_ALLOW_THREADS
    return Py_BuildValue("(KK)", counts[0], counts[1]);
}

PyDoc_STRVAR(
    placed_doc,
    "placed(length, fd) -> address\n\n"
    "Where mmap(2) maps the beginning of a file if it may choose, as the loader\n"
    "lets it.  Nothing stays mapped.");

static PyObject *
core_placed(PyObject *module, PyObject *args)
{
    uint64_t length;
    int fd;
    void *got;

    if (!PyArg_ParseTuple(args, "O&i:placed", to_uint64, &length, &fd))
        return NULL;
    got = mmap(NULL, length, PROT_READ, MAP_PRIVATE, fd, 0);
    if (got == MAP_FAILED)
        return fail(module, errno, "map", 0, length);
    if (munmap(got, length) < 0)
        return fail(module, errno, "unmap", (uintptr_t)got,
                    (uintptr_t)got + length);
    return PyLong_FromUnsignedLongLong((uintptr_t)got);
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

PyMethodDef page_primer_objects_methods[] = {
    {"objects", core_objects, METH_NOARGS, objects_doc},
    {"loads", core_loads, METH_NOARGS, loads_doc},
    {"placed", core_placed, METH_VARARGS, placed_doc},
    {"interpreter_address", core_interpreter_address, METH_NOARGS,
     interpreter_doc},
    {"threads", core_threads, METH_NOARGS, threads_doc},
    {NULL, NULL, 0, NULL},
};
