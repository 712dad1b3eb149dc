/* The process that --hold leaves behind: it keeps files locked in memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "warm.h"

#ifndef SYS_close_range
#define SYS_close_range 436 /* Linux 5.9 */
#endif
#define LAST_OF_OLD 1024

/* Lock a file's span.  A file that another holder has locked is left to it:
 * flock(2) on the file itself tells, needs no rights, and ends with the
 * process.  Returns whether the file is held, by whomever; `ours` counts. */
static bool
lock(const char *path, int *ours)
{
    struct span span;
    struct rlimit limit;
    const char *why;
    int fd = open_target(path, &span, &why);

    if (fd < 0)
        return false;
    if (flock(fd, LOCK_EX | LOCK_NB)) {
        bool held = errno == EWOULDBLOCK;
        close(fd);
        return held;
    }
    char *there = map_range(fd, span.offset, span.length);
    if (there && !syscall(SYS_mlock, there, span.length)) {
        ++*ours;
        return true;
    }
    int error = errno;
    getrlimit(RLIMIT_MEMLOCK, &limit);
    fprintf(stderr, "%s: not held: %s (RLIMIT_MEMLOCK is %llu KiB)\n", path,
            strerror(error), (unsigned long long)limit.rlim_cur >> 10);
    close(fd);
    return false;
}

/* Be the holder: lock the files, tell by a byte on stdout that all are held,
 * let go of stdio, and wait for a signal. */
int
hold(char **paths)
{
    bool good = true;
    int ours = 0;
    sigset_t none;

    signal(SIGTERM, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    prctl(PR_SET_NAME, HOLDER);
    for (; *paths; paths++)
        good &= lock(*paths, &ours);
    if (good && write(STDOUT_FILENO, ".", 1) != 1)
        return 1;
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; null >= 0 && fd < 3; fd++)
        dup2(null, fd);
    close(null);
    if (null < 0 || chdir("/") || !ours)
        return 1;
    for (;;)
        pause();
}

/* Leave a holder behind, a grandchild in a session of its own.  Returns when
 * it has locked the files: true if all are held. */
bool
leave_holder(char **arguments)
{
    int ends[2];
    char done = 0;

    if (pipe2(ends, O_CLOEXEC))
        return false;
    pid_t child = fork();
    if (!child) {
        setsid();
        if (fork())
            _exit(0);
        dup2(ends[1], STDOUT_FILENO);
        if (syscall(SYS_close_range, 3U, ~0U, 0U))
            for (int fd = 3; fd < LAST_OF_OLD; fd++)
                close(fd);
        execve("/proc/self/exe", arguments, (char *[]){NULL});
        _exit(1);
    }
    close(ends[1]);
    if (child > 0)
        waitpid(child, NULL, 0);
    bool good = read(ends[0], &done, 1) == 1;
    close(ends[0]);
    return good;
}
