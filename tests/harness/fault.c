/* Preloaded into a process under test: lets the nth call that page_primer._core makes of a function
 * fail, as the kernel might.  Calls from elsewhere are not touched.  The interpreter's own memory
 * ("memory") fails whoever wants it.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static const char *armed;
static int countdown, times, number, fired;

void
fault_arm(const char *function, int nth, int errno_to_set)
{
    armed = function;
    countdown = nth;
    times = 1;
    number = errno_to_set;
    fired = 0;
}

/* After fault_arm(): so many calls fail, one after the other. */
void
fault_times(int count)
{
    times = count;
}

int
fault_fired(void)
{
    armed = NULL;
    return fired;
}

static int
is_armed(const char *function)
{
    return armed != NULL && strcmp(armed, function) == 0;
}

static int
is_due(void)
{
    if (--countdown > 0)
        return 0;
    /* From here on nothing may look up a symbol: there may be a hole where its table was. */
    if (--times == 0)
        armed = NULL;
    fired++;
    errno = number;
    return 1;
}

static __typeof__(&mmap) real_mmap;
static void *(*real_mremap)(void *, size_t, size_t, int, ...);
static __typeof__(&madvise) real_madvise;
static __typeof__(&mprotect) real_mprotect;
static __typeof__(&munmap) real_munmap;
static long (*real_syscall)(long, ...);
static ssize_t (*real_pread)(int, void *, size_t, off_t);
static int (*real_prctl)(int, ...);
static void *(*real_sbrk)(intptr_t);
static int (*real_stat)(const char *, struct stat64 *);
static __typeof__(&pthread_cond_timedwait) real_timedwait;
static int (*real_atfork)(void (*)(void), void (*)(void), void (*)(void),
                          void *);

__attribute__((constructor)) static void
resolve(void)
{
    real_mmap = dlsym(RTLD_NEXT, "mmap");
    real_mremap = dlsym(RTLD_NEXT, "mremap");
    real_madvise = dlsym(RTLD_NEXT, "madvise");
    real_mprotect = dlsym(RTLD_NEXT, "mprotect");
    real_munmap = dlsym(RTLD_NEXT, "munmap");
    real_syscall = dlsym(RTLD_NEXT, "syscall");
    real_pread = dlsym(RTLD_NEXT, "pread");
    real_prctl = dlsym(RTLD_NEXT, "prctl");
    real_sbrk = dlsym(RTLD_NEXT, "sbrk");
    real_stat = dlsym(RTLD_NEXT, "stat64");
    real_timedwait = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    real_atfork = dlsym(RTLD_NEXT, "__register_atfork");
}

static int
fails(const char *function, void *caller)
{
    Dl_info from;

    if (real_mmap == NULL) /* another library's constructor came first */
        resolve();
    return is_armed(function) && dladdr(caller, &from)
        && strstr(from.dli_fname, "/_core.") != NULL && is_due();
}

#define CALLER __builtin_return_address(0)

void *
mmap(void *address, size_t length, int protection, int flags, int fd,
     off_t offset)
{
    if (fails("mmap", CALLER))
        return MAP_FAILED;
    /* Kernels before 4.17 do not know the flag, and take the address for a hint. */
    if ((flags & MAP_FIXED_NOREPLACE) && fails("mmap by a hint", CALLER))
        flags &= ~MAP_FIXED_NOREPLACE;
    /* Kernels before 6.12 unmap what a MAP_FIXED replaces before their last checks. */
    if ((flags & MAP_FIXED) && fails("mmap with a hole", CALLER)) {
        real_munmap(address, length);
        errno = number;
        return MAP_FAILED;
    }
    return real_mmap(address, length, protection, flags, fd, offset);
}

void *
mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));

void *
mremap(void *old, size_t old_size, size_t new_size, int flags, ...)
{
    va_list rest;
    void *to;

    va_start(rest, flags);
    to = va_arg(rest, void *);
    va_end(rest);
    if (fails("mremap", CALLER))
        return MAP_FAILED;
    if (fails("mremap with a hole", CALLER)) {
        real_munmap(to, new_size);
        errno = number;
        return MAP_FAILED;
    }
    return real_mremap(old, old_size, new_size, flags, to);
}

int
madvise(void *address, size_t length, int advice)
{
    if (fails("madvise that takes long", CALLER))
        usleep(20000);
    return fails("madvise", CALLER) ? -1
                                    : real_madvise(address, length, advice);
}

int
mprotect(void *address, size_t length, int protection)
{
    return fails("mprotect", CALLER)
        ? -1
        : real_mprotect(address, length, protection);
}

int
munmap(void *address, size_t length)
{
    return fails("munmap", CALLER) ? -1 : real_munmap(address, length);
}

/* These are made by number. */
long
syscall(long call, ...)
{
    long arguments[6];
    const char *name;
    va_list rest;

    va_start(rest, call);
    for (int i = 0; i < 6; i++)
        arguments[i] = va_arg(rest, long);
    va_end(rest);
    name = call == SYS_mlock || call == SYS_mlock2 ? "mlock"
        : call == SYS_getresuid                    ? "getresuid"
        : call == SYS_getresgid                    ? "getresgid"
        : call == SYS_capget                       ? "capget"
        : call == SYS_memfd_create                 ? "memfd_create"
                                                   : "syscall";
    if (fails(name, CALLER))
        return -1;
    return real_syscall(call, arguments[0], arguments[1], arguments[2],
                        arguments[3], arguments[4], arguments[5]);
}

extern ssize_t
pread(int, void *, size_t, off_t);

ssize_t
pread(int fd, void *buffer, size_t count, off_t offset)
{
    return fails("pread", CALLER) ? -1 : real_pread(fd, buffer, count, offset);
}

ssize_t
pread64(int, void *, size_t, off_t) __attribute__((alias("pread")));

int
prctl(int option, ...)
{
    unsigned long arguments[4];
    va_list rest;

    va_start(rest, option);
    for (int i = 0; i < 4; i++)
        arguments[i] = va_arg(rest, unsigned long);
    va_end(rest);
    if (fails("prctl", CALLER))
        return -1;
    return real_prctl(option, arguments[0], arguments[1], arguments[2],
                      arguments[3]);
}

void *
sbrk(intptr_t increment)
{
    if (increment != 0 && fails("sbrk", CALLER))
        return (void *)-1;
    return real_sbrk(increment);
}

/* From glibc 2.33 on. */
int
stat64(const char *path, struct stat64 *result)
{
    return fails("stat", CALLER) ? -1 : real_stat(path, result);
}

int
pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex,
                       const struct timespec *until)
{
    if (fails("pthread_cond_timedwait", CALLER))
        return number;
    return real_timedwait(condition, mutex, until);
}

/* What pthread_atfork() is, which glibc links into each library. */
int
__register_atfork(void (*before)(void), void (*after)(void),
                  void (*child)(void), void *library)
{
    if (fails("pthread_atfork", CALLER))
        return number;
    if (fails("pthread_atfork that waits for another", CALLER))
        for (int i = 0; i < 10000 && fired < 2; i++)
            usleep(1000);
    return real_atfork(before, after, child, library);
}

/* ---------------------------------------------------------------------- memory --- */

extern void *
__libc_malloc(size_t);
extern void *
__libc_calloc(size_t, size_t);

void *
malloc(size_t size)
{
    /* Not before it is armed: to resolve the others may take memory. */
    return is_armed("malloc") && fails("malloc", CALLER) ? NULL
                                                         : __libc_malloc(size);
}

void *
calloc(size_t count, size_t size)
{
    return is_armed("calloc") && fails("calloc", CALLER)
        ? NULL
        : __libc_calloc(count, size);
}

/* As in CPython's Include/cpython/pymem.h. */
typedef struct {
    void *ctx;
    void *(*malloc)(void *ctx, size_t size);
    void *(*calloc)(void *ctx, size_t count, size_t size);
    void *(*realloc)(void *ctx, void *pointer, size_t size);
    void (*free)(void *ctx, void *pointer);
} allocator;

static allocator before[3]; /* by domain */

static void *
memory_malloc(void *ctx, size_t size)
{
    allocator *of = ctx;

    if (is_armed("memory") && is_due())
        return NULL;
    return of->malloc(of->ctx, size);
}

static void *
memory_calloc(void *ctx, size_t count, size_t size)
{
    allocator *of = ctx;

    if (is_armed("memory") && is_due())
        return NULL;
    return of->calloc(of->ctx, count, size);
}

static void *
memory_realloc(void *ctx, void *pointer, size_t size)
{
    allocator *of = ctx;

    if (is_armed("memory") && is_due())
        return NULL;
    return of->realloc(of->ctx, pointer, size);
}

static void
memory_free(void *ctx, void *pointer)
{
    allocator *of = ctx;

    of->free(of->ctx, pointer);
}

/* Once, before "memory" is armed. */
void
fault_memory(void)
{
    void (*get)(int, allocator *) = dlsym(RTLD_DEFAULT, "PyMem_GetAllocator");
    void (*set)(int, allocator *) = dlsym(RTLD_DEFAULT, "PyMem_SetAllocator");

    for (int domain = 0; domain < 3; domain++) {
        get(domain, &before[domain]);
        set(domain,
            &(allocator){&before[domain], memory_malloc, memory_calloc,
                         memory_realloc, memory_free});
    }
}
