/* page-primer-warm: bring aligned files into memory on huge pages, then
 * execute a command, whatever happened to a file.
 *
 * The page cache keeps a file in pieces of the size that its first reader or
 * writer caused: 2 MiB where that was a mapping advised MADV_HUGEPAGE, less
 * where it was ld.so or the unpacking of an image.  An interpreter could not
 * do this, for it maps the very pages that may have to be dropped. */
#define _GNU_SOURCE
#include <elf.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char usage[] =
    "usage: page-primer-warm [-q] [--hold] [PATH ...] [-- COMMAND ARG ...]\n"
    "Brings aligned files (page-primer align) into memory on huge pages, then\n"
    "executes COMMAND. Without a PATH: those that `page-primer align` lists.\n"
    "  -q      print nothing about files\n"
    "  --hold  leave a process that keeps them in memory (mlock)\n"
    "Exit status: 0 all on huge pages, 1 not all, 2 usage; or COMMAND's.\n";

enum {
    POPULATE_READ = 22, /* madvise(2), Linux 5.14 */
    COLLAPSE = 25,      /* likewise, Linux 6.1 */
    CLOSE_RANGE = 436,  /* the system call's number, Linux 5.9 */
    MOST_LINES = 4096,  /* of a list */
    LEAST_PAGE = 4096,  /* of a segment the last is mapped whole */
};

/* The whole huge pages of a file's code. */
struct span {
    off_t offset;
    size_t length, huge;
    bool shared; /* other processes map small pages of it */
};

#define PMD_SIZE "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"
static size_t pmd = 2 << 20; /* bytes of a huge page */
static FILE *failures, *successes;
static bool keep; /* locked in memory, */
static int kept;  /* so many files */

/* Map a range as a loader does, at a boundary, and fault it in.  Nothing here
 * touches it: a file truncated meanwhile is an error, not a SIGBUS. */
static char *
map_range(int fd, off_t offset, size_t length)
{
    char *room = mmap(NULL, length + pmd, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    munmap(room, length + pmd);
    char *there = mmap(room + (-(uintptr_t)room & (pmd - 1)), length,
                       PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, offset);
    if (there == MAP_FAILED)
        return NULL;
    madvise(there, length, MADV_HUGEPAGE);
    madvise(there, length, POPULATE_READ);
    return there;
}

/* Map a range for a moment and see in smaps whether all of it is huge; note in
 * the span how much is, and whether others map it. */
static bool
is_huge(int fd, off_t offset, size_t length, bool collapse, struct span *span)
{
    char line[PATH_MAX + 128], name[32];
    unsigned long start, end, kib, at = 0;
    char *there = map_range(fd, offset, length);

    span->huge = 0;
    if (!there)
        return false;
    if (collapse && madvise(there, length, COLLAPSE) && errno == EAGAIN)
        madvise(there, length, COLLAPSE);
    FILE *file = fopen("/proc/self/smaps", "re");
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            at = start;
        else if (at == (unsigned long)there
                 && sscanf(line, "%31[^:]: %lu", name, &kib) == 2) {
            if (strstr(name, "PmdMapped"))
                span->huge += kib << 10;
            span->shared |= kib && !strncmp(name, "Shared_", 7);
        }
    if (file)
        fclose(file);
    munmap(there, length);
    return span->huge == length;
}

/* Have a span in memory on huge pages: as it is, collapsed in place, or
 * dropped from the cache and read anew, which changes nothing about pages that
 * others map.  Nothing is dropped any more once the kernel has no huge page to
 * give.  Returns what was done, or why not all of it is huge. */
static const char *
bring_in(int fd, struct span *span)
{
    off_t at = span->offset, end = at + (off_t)span->length;
    bool held = false;

    if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1)
        return ": huge pages are disabled here (PR_SET_THP_DISABLE)";
    if (is_huge(fd, at, span->length, false, span))
        return "";
    fdatasync(fd); /* dirty pages are not dropped */
    if (is_huge(fd, at, span->length, true, span))
        return ", collapsed";
    for (; at < end; at += pmd) {
        span->shared = false;
        if (is_huge(fd, at, pmd, false, span))
            continue;
        posix_fadvise(fd, at, pmd, POSIX_FADV_DONTNEED);
        if (is_huge(fd, at, pmd, false, span))
            continue;
        if (!span->shared)
            break;
        held = true;
    }
    if (is_huge(fd, span->offset, span->length, false, span))
        return ", read anew";
    return held ? ": other processes map it in small pages"
                : ": the kernel gave no huge page";
}

/* Find the largest read-only PT_LOAD with code that lies on huge pages: its
 * address and offset agree, and it is placed by its p_align, or it is an
 * ET_EXEC.  Returns NULL, or why there is none. */
static const char *
find_span(int fd, struct span *span)
{
    Elf64_Ehdr file;
    Elf64_Phdr load;
    struct stat status;

    if (fstat(fd, &status) || !S_ISREG(status.st_mode))
        return "not a regular file";
    /* To read the header must not bring the first pages in small pieces. */
    char *first = map_range(fd, 0, pmd);
    if (first)
        munmap(first, pmd);
    if (pread(fd, &file, sizeof file, 0) != sizeof file
        || memcmp(file.e_ident, ELFMAG "\2", EI_CLASS + 1) /* ELFCLASS64 */
        || file.e_phentsize != sizeof load)
        return "not a 64-bit ELF file";
    for (int i = 0; i < file.e_phnum; i++) {
        uint64_t size = status.st_size, at = file.e_phoff + i * sizeof load;
        if (pread(fd, &load, sizeof load, at) != sizeof load)
            return "truncated";
        if (load.p_type != PT_LOAD)
            continue;
        if (load.p_offset > size || load.p_filesz > size - load.p_offset)
            return "truncated";
        uint64_t from = (load.p_offset + pmd - 1) & -pmd;
        uint64_t to = (load.p_offset + load.p_filesz + LEAST_PAGE - 1) & -pmd;
        if ((load.p_flags & (PF_R | PF_W | PF_X)) == (PF_R | PF_X)
            && !((load.p_vaddr - load.p_offset) % pmd)
            && (load.p_align >= pmd || file.e_type == ET_EXEC) && to > from
            && to - from > span->length)
            *span = (struct span){.offset = from, .length = to - from};
    }
    if (span->length / getpagesize() > (size_t)sysconf(_SC_PHYS_PAGES) / 4)
        return "larger than a quarter of the memory";
    return span->length ? NULL : "not aligned (see page-primer align)";
}

/* Warm one file and print a line about it, unless that is not wanted.  Neither
 * a FIFO nor a terminal makes open(2) wait or does anything to the caller. */
static bool
warm(const char *path)
{
    struct span span = {0};
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    const char *what = fd < 0 ? strerror(errno) : find_span(fd, &span);
    bool found = fd >= 0 && !what;

    if (found)
        what = bring_in(fd, &span);
    bool good = found && span.huge == span.length;
    FILE *to = good ? successes : failures;
    if (to && !found)
        fprintf(to, "%s: not warmed: %s\n", path, what);
    else if (to)
        fprintf(to, "%s: %zu of %zu KiB on huge pages%s\n", path,
                span.huge >> 10, span.length >> 10, what);
    if (keep && found) {
        char *there = map_range(fd, span.offset, span.length);
        bool locked = there && !mlock(there, span.length);
        if (!locked)
            warn("%s: not held (RLIMIT_MEMLOCK)", path);
        kept += locked;
        good &= locked;
    }
    if (fd >= 0)
        close(fd);
    return good;
}

/* Warm the files of a list of absolute paths, one a line. */
static bool
warm_listed(const char *name, bool required)
{
    char line[PATH_MAX + 1];
    int fd = open(name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    FILE *list = fd < 0 ? NULL : fdopen(fd, "r");
    bool good = true;

    for (int i = 0; list && i < MOST_LINES; i++) {
        if (!fgets(line, sizeof line, list))
            break;
        line[strcspn(line, "\n")] = 0;
        if (*line == '/')
            good &= warm(line);
    }
    if (required && (!list || ferror(list)))
        warn("%s", name), good = false;
    if (list)
        fclose(list);
    return good;
}

/* Warm the files that are named, or else what `page-primer align` has recorded
 * for root and for this user. */
static bool
warm_all(char **word, char **end)
{
    const char *list = getenv("PAGE_PRIMER_ALIGNED");
    const char *home = getenv("HOME"), *state = getenv("XDG_STATE_HOME");
    char path[PATH_MAX];
    bool good = true, named = false;

    for (; word < end; word++)
        if (**word != '-') {
            named = true;
            good &= warm(*word);
        }
    if (named)
        return good;
    if (list && *list)
        return warm_listed(list, true);
    good = warm_listed("/var/lib/page-primer/aligned", false);
    if (!geteuid())
        return good;
    if (state && *state)
        snprintf(path, sizeof path, "%s/page-primer/aligned", state);
    else
        snprintf(path, sizeof path, "%s/.local/state/page-primer/aligned",
                 home ? home : "");
    return warm_listed(path, false) && good;
}

/* Warm the files in a grandchild that keeps them locked, in a session of its
 * own and with nothing of our caller's.  Returns when it has. */
static bool
leave_holder(char **word, char **end)
{
    int ends[2];
    bool good = false;
    sigset_t none;

    if (pipe2(ends, O_CLOEXEC))
        return false;
    pid_t child = fork();
    if (!child) {
        if (fork())
            _exit(0);
        prctl(PR_SET_NAME, "primer-hold");
        setsid();
        signal(SIGTERM, SIG_DFL);
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        good = warm_all(word, end) && !chdir("/");
        fflush(stdout);
        int null = open("/dev/null", O_RDWR);
        for (int fd = 0; null >= 0 && fd < 3; fd++)
            dup2(null, fd);
        if (write(ends[1], &good, sizeof good) < 0)
            _exit(1);
        syscall(CLOSE_RANGE, 3U, ~0U, 0U);
        while (kept)
            pause();
        _exit(0);
    }
    close(ends[1]);
    if (child > 0)
        waitpid(child, NULL, 0);
    if (read(ends[0], &good, sizeof good) != sizeof good)
        good = false;
    close(ends[0]);
    return good;
}

int
main(int argc, char **argv)
{
    bool quiet = false;
    int fd, end;

    for (end = 1; end < argc && strcmp(argv[end], "--"); end++)
        if (!strcmp(argv[end], "-q"))
            quiet = true;
        else if (!strcmp(argv[end], "--hold"))
            keep = true;
        else if (!strcmp(argv[end], "--help"))
            return fputs(usage, stdout) < 0;
        else if (*argv[end] == '-')
            return fputs(usage, stderr), 2;
    char **command = end + 1 < argc ? argv + end + 1 : NULL;
    failures = quiet ? NULL : command ? stderr : stdout;
    successes = command ? NULL : failures;

    /* What we open is never taken for stdio that is closed.  A closed pipe or
     * `ulimit -f` must not end us; COMMAND finds both signals as they were. */
    while ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && fd < 3)
        ;
    close(fd);
    void (*pipe)(int) = signal(SIGPIPE, SIG_IGN);
    void (*limit)(int) = signal(SIGXFSZ, SIG_IGN);
    FILE *file = fopen(PMD_SIZE, "re"); /* or there are no huge pages */
    if (file && fscanf(file, "%zu", &pmd) != 1)
        pmd = 2 << 20;
    if (file)
        fclose(file);
    bool good = (keep ? leave_holder : warm_all)(argv + 1, argv + end);
    fflush(stdout);
    signal(SIGPIPE, pipe);
    signal(SIGXFSZ, limit);
    if (!command)
        return !good;
    execvp(*command, command);
    signal(SIGPIPE, SIG_IGN); /* to say so must not end us, either */
    signal(SIGXFSZ, SIG_IGN);
    end = errno == ENOENT || errno == ENOTDIR ? 127 : 126;
    warn("%s", *command);
    return end;
}
