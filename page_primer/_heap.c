/* page_primer._core, the heap: an arena allocator for pymalloc that hands out
 * parts of huge pages, and what has to be asked about malloc.
 *
 * pymalloc asks for its memory in arenas: 1 MiB each since CPython 3.10, from
 * an allocator that PyObject_SetArenaAllocator() exchanges.  An mmap(2) of
 * 1 MiB is no huge page, wherever it lies.  Ours maps regions of one huge page
 * (2 MiB), aligned and advised, and hands out their parts, called slots here.
 *
 * The hooks are called by pymalloc, so no Python object may be made in them.
 * The GIL is held there, but since CPython 3.12 an interpreter may have a GIL
 * of its own while the arena allocator is one for all: hence the mutex.  It
 * is never held over a call of the allocator that was there before, nor over a
 * fork: other libraries' pthread_atfork() handlers may run Python, or wait for
 * whoever does.  While a fork is under way the table is left as it is, so that
 * the child inherits a whole one: new arenas are the allocator's before, and
 * what is freed of ours is only noted, one bit in one word, until the fork is
 * over.
 *
 * What must hold at any time: the table lists the regions that are mapped, and
 * a slot counts as used from the moment it is handed out until pymalloc frees
 * it.  An address that is no used slot of ours belongs to the allocator before.
 */

/* Longer: one allocator, whose state is this file's alone. */

#include "_core.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#define PR_SET_VMA_ANON_NAME 0
#endif

/* A smaller request is none for an arena: CPython has its frames' stack from
 * the same allocator, in pieces of 16 KiB. */
#define LEAST ((size_t)256 << 10)

/* Below this a page fault had a huge page at hand, or did without: clearing
 * one takes a tenth of it.  Above, the kernel was looking for one (direct
 * compaction), and requests should not wait for that. */
#define STALL_NS 5000000

/* Not in the stable ABI: as in CPython's Include/cpython/objimpl.h. */
typedef struct {
    void *ctx;
    void *(*alloc)(void *ctx, size_t size);
    void (*free)(void *ctx, void *address, size_t size);
} arena_allocator;

typedef void (*arena_accessor)(arena_allocator *);

typedef struct {
    uintptr_t base;
    size_t slot;   /* bytes of each of its slots */
    uint32_t used; /* slots that pymalloc has, a bit each */
    uint32_t warm; /* free slots that hold memory */
    uint32_t late; /* used slots that were freed amid a fork */
} region;

static struct {
    pthread_mutex_t mutex;
    arena_allocator previous;
    arena_accessor get, set;
    int watched;        /* forks are */
    unsigned int forks; /* under way: the table stays as it is */
    int late;           /* a region has late slots */
    int installed;      /* CPython was given our functions */
    atomic_int active;  /* new arenas are ours */
    size_t huge;        /* bytes of a huge page, and of a region */
    region *table;      /* by address */
    size_t count, room; /* regions */
    size_t free_slots;
    size_t given; /* bytes that pymalloc has of ours */
    size_t spare; /* bytes of warm slots */
    unsigned long long made, small, unadvised, cooled, slowest;
    unsigned int stalls, skip;
} heap = {.mutex = PTHREAD_MUTEX_INITIALIZER};

/* ----------------------------------------------------------- the table --- */

static uint32_t
all_slots(const region *r)
{
    size_t count = heap.huge / r->slot;

    return count >= 32 ? UINT32_MAX : ((uint32_t)1 << count) - 1;
}

/* The index of the first region that does not lie below an address. */
static size_t
place_of(uintptr_t base)
{
    size_t low = 0, high = heap.count;

    while (low < high) {
        size_t middle = (low + high) / 2;
        if (heap.table[middle].base < base)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static region *
find(uintptr_t address)
{
    uintptr_t base = address & ~((uintptr_t)heap.huge - 1);
    size_t at = place_of(base);

    if (at < heap.count && heap.table[at].base == base)
        return &heap.table[at];
    return NULL;
}

/* Returns the new entry, or NULL where there is no memory for one. */
static region *
insert(uintptr_t base, size_t slot)
{
    size_t at;

    if (heap.count == heap.room) {
        size_t room = heap.room ? 2 * heap.room : 4096 / sizeof(region);
        void *more = heap.table
            ? mremap(heap.table, heap.room * sizeof(region),
                     room * sizeof(region), MREMAP_MAYMOVE)
            : mmap(NULL, room * sizeof(region), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (more == MAP_FAILED)
            return NULL;
        heap.table = more;
        heap.room = room;
    }
    at = place_of(base);
    memmove(&heap.table[at + 1], &heap.table[at],
            (heap.count - at) * sizeof(region));
    heap.table[at] = (region){.base = base, .slot = slot};
    heap.count++;
    return &heap.table[at];
}

static void
forget(region *r)
{
    size_t at = (size_t)(r - heap.table);

    memmove(r, r + 1, (heap.count - at - 1) * sizeof(region));
    heap.count--;
}

static size_t
warm_bytes(const region *r)
{
    return (size_t)__builtin_popcount(r->warm) * r->slot;
}

/* ------------------------------------------------------------- regions --- */

/* Map one huge page's worth of address space, aligned; 0 where that fails.
 * Since Linux 6.7 the first try is aligned by itself. */
static uintptr_t
map_aligned(size_t size)
{
    const int protection = PROT_READ | PROT_WRITE;
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    uintptr_t area, start;
    void *got = mmap(NULL, size, protection, flags, -1, 0);

    if (got == MAP_FAILED)
        return 0;
    if (((uintptr_t)got & (size - 1)) == 0)
        return (uintptr_t)got;
    munmap(got, size);
    got = mmap(NULL, 2 * size, protection, flags, -1, 0);
    if (got == MAP_FAILED)
        return 0;
    area = (uintptr_t)got;
    start = (area + size - 1) & ~((uintptr_t)size - 1);
    if (start > area)
        munmap((void *)area, start - area);
    munmap((void *)(start + size), area + size - start);
    return start;
}

static unsigned long long
nanoseconds(clockid_t clock)
{
    struct timespec now;

    clock_gettime(clock, &now);
    return (unsigned long long)now.tv_sec * 1000000000u
        + (unsigned long long)now.tv_nsec;
}

/* Where this thread stands: by the clock, by its processor time, and how often
 * it went to sleep of its own. */
typedef struct {
    unsigned long long clock, processor;
    long sleeps;
} moment;

static moment
this_moment(void)
{
    struct rusage used = {0};

    (void)getrusage(RUSAGE_THREAD, &used);
    return (moment){nanoseconds(CLOCK_MONOTONIC),
                    nanoseconds(CLOCK_THREAD_CPUTIME_ID), used.ru_nvcsw};
}

/* How long the kernel took since then.  Where it did not sleep, what goes
 * beyond processor time was taken by other threads, on a busy machine. */
static unsigned long long
taken_since(moment then)
{
    moment now = this_moment();

    return now.sleeps > then.sleeps ? now.clock - then.clock
                                    : now.processor - then.processor;
}

/* Advise a new region and write its first byte, which pymalloc is about to do:
 * that is when the kernel looks for a huge page.  With its defaults (`defrag`)
 * it goes to great lengths for what is advised, and a request may wait.  So
 * the time is taken, and after a slow one some regions go without advice, twice
 * as many each time: they are small until a hook has them collapsed. */
static void
first_touch(uintptr_t base, size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    unsigned long long took;
    unsigned char second = 0;
    moment began;
    int advise;

    pthread_mutex_lock(&heap.mutex);
    advise = heap.skip == 0;
    if (!advise)
        heap.skip--;
    pthread_mutex_unlock(&heap.mutex);

    began = this_moment();
    if (advise)
        (void)madvise((void *)base, size, MADV_HUGEPAGE);
    *(volatile char *)base = 0;
    took = taken_since(began);
    /* The second page came with the first one if they are one huge page. */
    (void)mincore((void *)(base + page), page, &second);

    pthread_mutex_lock(&heap.mutex);
    heap.made++;
    heap.small += !(second & 1);
    heap.unadvised += !advise;
    if (advise && took > heap.slowest)
        heap.slowest = took;
    if (advise && took > STALL_NS) {
        heap.stalls += heap.stalls < 8;
        heap.skip = 1u << heap.stalls;
    } else if (advise && (second & 1))
        heap.stalls = 0;
    pthread_mutex_unlock(&heap.mutex);
}

/* A slot of a new region; 0 where there is none to be had. */
static uintptr_t
take_new(size_t size)
{
    uintptr_t base = map_aligned(heap.huge);
    region *r;

    if (base == 0)
        return 0;
    /* For people who read maps, and for `page-primer status`; older kernels
     * do without. */
    (void)prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, base, heap.huge,
                "page-primer arenas");
    first_touch(base, heap.huge);
    pthread_mutex_lock(&heap.mutex);
    r = heap.forks ? NULL : insert(base, size);
    if (r != NULL) {
        r->used = 1;
        r->warm = all_slots(r) & ~r->used;
        heap.free_slots += heap.huge / size - 1;
        heap.given += size;
        heap.spare += warm_bytes(r);
    }
    pthread_mutex_unlock(&heap.mutex);
    if (r == NULL) {
        munmap((void *)base, heap.huge);
        return 0;
    }
    return base;
}

/* How much a free slot of a region is to be preferred; 0: it has none.  A
 * region that is free altogether can be given back, so it comes after those in
 * use; a slot without memory would be filled in small pages, so it is last. */
static int
preference(const region *r, size_t size)
{
    uint32_t available = all_slots(r) & ~r->used;

    if (r->slot != size || available == 0)
        return 0;
    if (!(available & r->warm))
        return 1;
    return r->used ? 3 : 2;
}

/* A free slot of a region that is there; 0 if all are in use. */
static uintptr_t
take_free(size_t size)
{
    region *best = NULL;
    uint32_t available;
    int rank = 0, slot;

    if (heap.free_slots == 0)
        return 0;
    for (size_t i = 0; i < heap.count && rank < 3; i++) {
        int found = preference(&heap.table[i], size);
        if (found > rank) {
            rank = found;
            best = &heap.table[i];
        }
    }
    if (best == NULL)
        return 0;
    available = all_slots(best) & ~best->used;
    if (rank > 1) {
        available &= best->warm;
        heap.spare -= size;
    }
    slot = __builtin_ctz(available);
    best->used |= (uint32_t)1 << slot;
    best->warm &= ~((uint32_t)1 << slot);
    heap.free_slots--;
    heap.given += size;
    return best->base + (size_t)slot * size;
}

/* Give a region that is free altogether back to the kernel. */
static int
unmap_region(region *r)
{
    if (munmap((void *)r->base, heap.huge) < 0)
        return -1; /* no mapping to be had for what remains */
    heap.spare -= warm_bytes(r);
    heap.free_slots -= heap.huge / r->slot;
    forget(r);
    return 0;
}

/* Give the memory of a region's free slots back, and keep their addresses.  That
 * splits the huge page. */
static void
cool(region *r)
{
    for (size_t i = 0; i < heap.huge / r->slot; i++)
        if (r->warm & ((uint32_t)1 << i))
            (void)madvise((void *)(r->base + i * r->slot), r->slot,
                          MADV_DONTNEED);
    heap.spare -= warm_bytes(r);
    heap.cooled++;
    r->warm = 0; /* whatever came of it: not to be tried again */
}

/* Some free memory is kept, so that a process at the edge of an arena does not
 * map and clear a huge page each time: one region, or a 32nd of what pymalloc
 * has.  The rest goes back, whole regions first. */
static void
trim(void)
{
    size_t keep = heap.given / 32;

    if (keep < heap.huge)
        keep = heap.huge;
    if (!heap.active)
        keep = 0;
    for (size_t i = heap.count; i-- > 0 && heap.spare > keep;)
        if (heap.table[i].used == 0 && heap.table[i].warm)
            if (unmap_region(&heap.table[i]) < 0)
                cool(&heap.table[i]);
    for (size_t i = heap.count; i-- > 0 && heap.spare > keep;)
        if (heap.table[i].warm)
            cool(&heap.table[i]);
    /* Cold and free altogether: nothing but addresses. */
    for (size_t i = heap.count; i-- > 0;)
        if (heap.table[i].used == 0 && heap.table[i].warm == 0)
            (void)unmap_region(&heap.table[i]);
}

static void
take_back(region *r, uint32_t slots)
{
    const size_t count = (size_t)__builtin_popcount(slots);

    r->used &= ~slots;
    r->warm |= slots;
    heap.free_slots += count;
    heap.given -= count * r->slot;
    heap.spare += count * r->slot;
}

/* ----------------------------------------------------- what pymalloc calls */

static int
is_arena(size_t size)
{
    return size >= LEAST && size <= heap.huge && heap.huge % size == 0
        && heap.huge / size <= 32;
}

static void *
arena_alloc(void *ctx, size_t size)
{
    (void)ctx;
    if (heap.active && is_arena(size)) {
        uintptr_t address = 0;
        int forking;

        pthread_mutex_lock(&heap.mutex);
        forking = heap.forks > 0;
        if (!forking)
            address = take_free(size);
        pthread_mutex_unlock(&heap.mutex);
        if (address == 0 && !forking)
            address = take_new(size);
        if (address != 0)
            return (void *)address;
    }
    return heap.previous.alloc(heap.previous.ctx, size);
}

static void
arena_free(void *ctx, void *pointer, size_t size)
{
    const uintptr_t address = (uintptr_t)pointer;
    int ours = 0;

    (void)ctx;
    pthread_mutex_lock(&heap.mutex);
    region *r = heap.count ? find(address) : NULL;
    if (r != NULL && r->slot == size && (address - r->base) % size == 0) {
        uint32_t bit = (uint32_t)1 << ((address - r->base) / size);
        if (r->used & bit) {
            ours = 1;
            if (heap.forks) {
                r->late |= bit;
                heap.late = 1;
            } else {
                take_back(r, bit);
                trim();
            }
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    if (!ours)
        heap.previous.free(heap.previous.ctx, pointer, size);
}

/* ----------------------------------------------------------- switching --- */

static void
before_fork(void)
{
    pthread_mutex_lock(&heap.mutex);
    heap.forks++;
    pthread_mutex_unlock(&heap.mutex);
}

/* Do what was put off while forks were under way. */
static void
catch_up(void)
{
    for (size_t i = 0; heap.late && i < heap.count; i++) {
        take_back(&heap.table[i], heap.table[i].late);
        heap.table[i].late = 0;
    }
    heap.late = 0;
    trim();
}

static void
after_fork(void)
{
    pthread_mutex_lock(&heap.mutex);
    if (heap.forks > 0 && --heap.forks == 0)
        catch_up();
    pthread_mutex_unlock(&heap.mutex);
}

/* Whoever else held the mutex is not here, and did not change the table. */
static void
in_child(void)
{
    heap.mutex = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    heap.forks = 0;
    catch_up();
}

/* Without the GIL: glibc 2.28 to 2.35 waits for the handlers of a fork, and
 * another library's may wait for the GIL.  So two threads may come here, and
 * each fork counts twice then, before it and after it, which does no harm. */
static int
watch_forks(void)
{
    int failed;

    Py_BEGIN_ALLOW_THREADS
    failed = pthread_atfork(before_fork, after_fork, in_child);
    Py_END_ALLOW_THREADS
    heap.watched = !failed || heap.watched;
    return failed;
}

static int
on_top(void)
{
    arena_allocator now;

    heap.get(&now);
    return now.alloc == arena_alloc && now.free == arena_free;
}

/* Somebody put an allocator back that is older than ours: pymalloc frees our
 * arenas there from now on, as mappings, which they are. */
static void
abandon(void)
{
    heap.count = heap.free_slots = heap.given = heap.spare = 0;
}

PyDoc_STRVAR(
    arenas_install_doc,
    "arenas_install(huge) -> str\n\n"
    "Let pymalloc have its arenas in regions of `huge` bytes, a power of two: the\n"
    "size of a huge page.  Returns 'active'; 'below', where another allocator was\n"
    "installed over ours, which may still pass requests on; 'none', where this\n"
    "interpreter has no arena allocator; or 'fork', where forks cannot be watched, or\n"
    "amid one.");

static PyObject *
arenas_install(PyObject *module, PyObject *args)
{
    unsigned long long huge;
    arena_allocator now, ours = {NULL, arena_alloc, arena_free};
    arena_accessor get, set;
    const char *outcome = "active";

    (void)module;
    if (!PyArg_ParseTuple(args, "K:arenas_install", &huge))
        return NULL;
    if (huge < LEAST || (huge & (huge - 1)) || huge > (1ull << 30))
        return PyErr_Format(PyExc_ValueError, "not a huge page's size: %llu",
                            huge);
#ifdef Py_GIL_DISABLED
    (void)now, (void)ours, (void)get, (void)set;
    return PyUnicode_FromString("none");
#endif
    /* Without the GIL: a library that is being loaded may wait for it. */
    Py_BEGIN_ALLOW_THREADS
    enter_loader();
    get = (arena_accessor)dlsym(RTLD_DEFAULT, "PyObject_GetArenaAllocator");
    set = (arena_accessor)dlsym(RTLD_DEFAULT, "PyObject_SetArenaAllocator");
    leave_loader();
    Py_END_ALLOW_THREADS
    heap.get = get;
    heap.set = set;
    if (heap.get == NULL || heap.set == NULL)
        return PyUnicode_FromString("none");
    if (!heap.watched && watch_forks() != 0)
        return PyUnicode_FromString("fork");
    heap.get(&now);
    pthread_mutex_lock(&heap.mutex);
    if (heap.forks) {
        if (!heap.active)
            outcome = "fork";
    } else if (!on_top()) {
        if (heap.installed && now.alloc == heap.previous.alloc
            && now.free == heap.previous.free) {
            abandon();
            heap.installed = 0;
        }
        if (heap.installed) {
            outcome = "below"; /* over it we would call each other for ever */
        } else {
            heap.previous = now;
            heap.huge = huge;
            heap.installed = 1;
            heap.set(&ours);
        }
    }
    if (!heap.forks)
        heap.active = 1;
    pthread_mutex_unlock(&heap.mutex);
    return PyUnicode_FromString(outcome);
}

PyDoc_STRVAR(
    arenas_retire_doc,
    "arenas_retire() -> bool\n\n"
    "Hand out no more arenas.  True if the allocator before is installed again;\n"
    "False if ours stays, to free the arenas that it gave, or since another was\n"
    "installed over it.");

static PyObject *
arenas_retire(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    pthread_mutex_lock(&heap.mutex);
    heap.active = 0;
    if (heap.installed && heap.forks == 0) {
        trim();
        if (heap.count == 0 && on_top()) {
            heap.set(&heap.previous);
            heap.installed = 0;
        }
    }
    pthread_mutex_unlock(&heap.mutex);
    return PyBool_FromLong(!heap.installed);
}

/* ----------------------------------------------------------- questions --- */

PyDoc_STRVAR(arenas_regions_doc,
             "arenas_regions() -> [address, ...]\n\n"
             "The regions of one huge page each that are mapped, by address.");

static PyObject *
arenas_regions(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    PyObject *list = NULL;
    uintptr_t *bases = NULL;
    size_t count, room;

    (void)module;
    /* Making a list may make an arena: copy first, without objects. */
    do {
        pthread_mutex_lock(&heap.mutex);
        room = heap.count;
        pthread_mutex_unlock(&heap.mutex);
        free(bases);
        bases = malloc((room ? room : 1) * sizeof(*bases));
        if (bases == NULL)
            return PyErr_NoMemory();
        pthread_mutex_lock(&heap.mutex);
        count = heap.count;
        for (size_t i = 0; i < count && i < room; i++)
            bases[i] = heap.table[i].base;
        pthread_mutex_unlock(&heap.mutex);
    } while (count > room);
    list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; list != NULL && i < count; i++) {
        PyObject *base = PyLong_FromUnsignedLongLong(bases[i]);
        if (base == NULL || PyList_SetItem(list, (Py_ssize_t)i, base) < 0)
            Py_CLEAR(list);
    }
    free(bases);
    return list;
}

PyDoc_STRVAR(
    arenas_counts_doc,
    "arenas_counts() -> (regions, given, spare, made, small, unadvised, slowest)\n\n"
    "Regions that are mapped; bytes that pymalloc has of them; bytes of memory\n"
    "that are kept free; since the start: regions made, those that got no huge\n"
    "page at once, those not advised since the kernel was slow; and the longest\n"
    "time that one took, in nanoseconds.");

static PyObject *
arenas_counts(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    unsigned long long n[7];

    (void)module;
    pthread_mutex_lock(&heap.mutex);
    n[0] = heap.count;
    n[1] = heap.given;
    n[2] = heap.spare;
    n[3] = heap.made;
    n[4] = heap.small;
    n[5] = heap.unadvised;
    n[6] = heap.slowest;
    pthread_mutex_unlock(&heap.mutex);
    return Py_BuildValue("(KKKKKKK)", n[0], n[1], n[2], n[3], n[4], n[5],
                         n[6]);
}

PyDoc_STRVAR(region_size_doc,
             "region_size() -> int\n\n"
             "Bytes of each region; 0 before arenas_install().");

static PyObject *
region_size(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    return PyLong_FromSize_t(heap.huge);
}

PyDoc_STRVAR(
    heap_mark_doc,
    "heap_mark() -> int\n\n"
    "A number that differs when there may be something to collapse or to tell: the\n"
    "program break moved into another huge page, a region got small pages, or regions were\n"
    "made, twice as many as at the last change.");

static PyObject *
heap_mark(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    size_t huge = heap.huge ? heap.huge : (size_t)2 << 20;

    (void)module;
    return PyLong_FromUnsignedLongLong(
        ((uintptr_t)sbrk(0) + huge - 1) / huge
        + ((heap.small + heap.cooled) << 40)
        + ((uint64_t)(64 - __builtin_clzll(heap.made | 1)) << 34));
}

/* Less than malloc's threshold for mmap(2) has been from the start, 128 KiB,
 * unless the environment says otherwise. */
#define BLOCK ((size_t)120 << 10)

PyDoc_STRVAR(
    heap_align_doc,
    "heap_align(huge) -> int\n\n"
    "Move the program break to a multiple of `huge`, the size of a huge page, so that\n"
    "what malloc and forked children add from there on begins a huge page.  What lies\n"
    "below it malloc has to hand out, less 240 KiB at most; one page in thirty is\n"
    "touched.  Returns the bytes by which the break was moved, 0 where malloc does not\n"
    "extend it; raises OSError where it cannot be.  No other thread may be in malloc\n"
    "meanwhile.");

/* From the break to the next multiple of a huge page. */
static size_t
distance(size_t huge)
{
    return -(uintptr_t)sbrk(0) & (huge - 1);
}

/* Malloc extends [heap] for blocks, as far as it has none that are free, and
 * no lower threshold for mmap(2) (MALLOC_MMAP_THRESHOLD_).  Only the rest is
 * skipped, which malloc never has.  A break that others move is provided for in
 * glibc (malloc/malloc.c, sysmalloc: "foreign sbrk"): it goes on from there, and
 * until then gives nothing back that lies below.  So the blocks can be freed
 * after it, and become the new top. */
static PyObject *
heap_align(PyObject *module, PyObject *args)
{
    void *blocks[(4 << 20) / BLOCK];
    const size_t room = sizeof(blocks) / sizeof(*blocks);
    unsigned long long huge;
    uintptr_t began;
    size_t count = 0, left, moved = 0;
    int failed = 0;

    (void)module;
    if (!PyArg_ParseTuple(args, "K:heap_align", &huge))
        return NULL;
    if (huge < LEAST || (huge & (huge - 1)) || huge > (4 << 20))
        return PyErr_Format(PyExc_ValueError, "not a huge page's size: %llu",
                            huge);
    began = (uintptr_t)sbrk(0);
    /* One block may grow it by itself and by M_TOP_PAD, also beyond. */
    while ((left = distance(huge)) > 2 * BLOCK && count < room
           && (blocks[count] = malloc(BLOCK)) != NULL)
        count++;
    if (left <= 2 * BLOCK) {
        failed = sbrk((intptr_t)left) == (void *)-1;
        moved = (uintptr_t)sbrk(0) - began;
    }
    while (count > 0)
        free(blocks[--count]);
    if (failed)
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromSize_t(moved);
}

PyDoc_STRVAR(
    malloc_object_doc,
    "malloc_object() -> (object, libc)\n\n"
    "The names of the ELF objects that the allocator is in, and that glibc is: equal\n"
    "unless another allocator took its place.  None where it is unknown, or where\n"
    "the C library is not glibc.");

static const char *
object_of(const char *symbol)
{
    Dl_info found = {.dli_fname = NULL};
    void *address;

    Py_BEGIN_ALLOW_THREADS
    enter_loader();
    address = dlsym(RTLD_DEFAULT, symbol);
    if (address != NULL && !dladdr(address, &found))
        found.dli_fname = NULL;
    leave_loader();
    Py_END_ALLOW_THREADS
    return found.dli_fname;
}

/* Not malloc() itself: a program that is linked for one address, and takes
 * malloc's, has an entry of its own for it, at which dlsym() then points.  Whoever
 * replaces malloc replaces malloc_usable_size() as well. */
static PyObject *
malloc_object(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    return Py_BuildValue("(yy)", object_of("malloc_usable_size"),
                         object_of("gnu_get_libc_version"));
}

PyMethodDef page_primer_heap_methods[] = {
    {"arenas_install", arenas_install, METH_VARARGS, arenas_install_doc},
    {"arenas_retire", arenas_retire, METH_NOARGS, arenas_retire_doc},
    {"arenas_regions", arenas_regions, METH_NOARGS, arenas_regions_doc},
    {"arenas_counts", arenas_counts, METH_NOARGS, arenas_counts_doc},
    {"region_size", region_size, METH_NOARGS, region_size_doc},
    {"heap_mark", heap_mark, METH_NOARGS, heap_mark_doc},
    {"heap_align", heap_align, METH_VARARGS, heap_align_doc},
    {"malloc_object", malloc_object, METH_NOARGS, malloc_object_doc},
    {NULL, NULL, 0, NULL},
};
