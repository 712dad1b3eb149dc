/* mapsnap.c - LD_PRELOAD library: after a call of
 * clock_gettime(CLOCK_PROCESS_CPUTIME_ID), write to $PAGE_WALKS_MAPS how many of
 * them there were, where pymalloc's arenas are, and a copy of /proc/self/smaps.
 * So the last call's is what remains: at exit the interpreter has freed much of
 * what the workload used. Used for both the native reference run and the traced
 * run, so that it disturbs both layouts alike. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#ifndef PR_SET_VMA
#define PR_SET_VMA 0x53564d41
#endif

enum { ARENA = 1 << 20, MOST = 1 << 16 };

static long marks;
static pid_t owner;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uintptr_t start;
    size_t size;
} arenas[MOST];
static size_t count;

static void
note(uintptr_t start, size_t size)
{
    pthread_mutex_lock(&lock);
    if (count < MOST) {
        arenas[count].start = start;
        arenas[count++].size = size;
    }
    pthread_mutex_unlock(&lock);
}

/* CPython's own arenas. malloc's blocks do not come here: its calls stay inside
 * libc. */
void *
mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    void *got =
        (void *)syscall(SYS_mmap, at, size, protection, flags, fd, offset);
    Dl_info by;

    if (got != MAP_FAILED && at == NULL && size == ARENA && fd == -1
        && dladdr(__builtin_return_address(0), &by) && by.dli_fname) {
        const char *slash = strrchr(by.dli_fname, '/');
        const char *name = slash ? slash + 1 : by.dli_fname;
        if (!strncmp(name, "libpython", 9) || !strncmp(name, "python", 6))
            note((uintptr_t)got, size);
    }
    return got;
}

void *
mmap64(void *at, size_t size, int protection, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

int
munmap(void *at, size_t size)
{
    int result = (int)syscall(SYS_munmap, at, size);

    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        if (result == 0 && arenas[i].start == (uintptr_t)at
            && arenas[i].size == size)
            arenas[i--] = arenas[--count];
    pthread_mutex_unlock(&lock);
    return result;
}

/* Those of page-primer, which names them, as far as the kernel knows names. */
int
prctl(int option, ...)
{
    unsigned long with[4];
    va_list list;

    va_start(list, option);
    for (int i = 0; i < 4; i++)
        with[i] = va_arg(list, unsigned long);
    va_end(list);
    if (option == PR_SET_VMA && with[3]
        && !strcmp((const char *)with[3], "page-primer arenas"))
        note(with[1], with[2]);
    return (int)syscall(SYS_prctl, option, with[0], with[1], with[2], with[3]);
}

static void
snap(void)
{
    static char text[1 << 16];
    const char *name = getenv("PAGE_WALKS_MAPS");
    /* QEMU shows the guest's maps, but the host's smaps. */
    const char *from = getenv("PAGE_WALKS_FROM");
    /* In the traced run nothing but the last may be traced. */
    const char *last = getenv("PAGE_WALKS_LAST");
    ssize_t got;
    int in, out;

    if (!name || getpid() != owner || (last && atol(last) != marks))
        return;
    in = open(from ? from : "/proc/self/smaps", O_RDONLY);
    out = open(name, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    dprintf(out, "marks %ld\n", marks);
    for (size_t i = 0; i < count; i++)
        dprintf(out, "arena %lx %zx\n", (unsigned long)arenas[i].start,
                arenas[i].size);
    while ((got = read(in, text, sizeof text)) > 0)
        if (write(out, text, got) != got)
            break;
    close(in);
    close(out);
}

int
clock_gettime(clockid_t id, struct timespec *now)
{
    int result = (int)syscall(SYS_clock_gettime, id, now);

    if (id == CLOCK_PROCESS_CPUTIME_ID) {
        pthread_mutex_lock(&lock);
        marks++;
        snap();
        pthread_mutex_unlock(&lock);
    }
    return result;
}

__attribute__((constructor)) static void
start(void)
{
    owner = getpid();
}
