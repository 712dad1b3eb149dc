/* page-primer-warm: bring aligned files into memory on huge pages, then
 * execute a command, whatever happened to a file, or stay and keep them.
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
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* `page-primer warm --help` says more. */
static const char usage[] =
    "usage: page-primer-warm [-q] [PATH ...] [-- COMMAND ARG ...]\n"
    "       page-primer-warm [-q] --hold [PATH ...]\n";

enum {
    POPULATE_READ = 22, /* madvise(2), Linux 5.14 */
    COLLAPSE = 25,      /* likewise, Linux 6.1 */
    /* Neither waits for a FIFO's writer nor takes a terminal. */
    OPEN_ANY = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC,
};

/* Whole huge pages of a file. */
struct span {
    off_t offset;
    size_t length, huge;
    bool shared; /* other processes map pages of it */
};

static size_t pmd;                 /* bytes of a huge page */
static FILE *failures, *successes; /* where they are told, or NULL */
static bool hold, held;            /* wanted, and obtained for a file */

/* Map a range as a loader does, at a boundary, and fault it in.  Nothing here
 * touches it: a file truncated meanwhile is an error, not a SIGBUS.  Nor need
 * a failure be looked for: nothing at MAP_FAILED is huge, or can be locked. */
static void *
map_range(int fd, off_t offset, size_t length)
{
    void *room = mmap(NULL, length + pmd, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    munmap(room, length + pmd);
    room = (void *)(((uintptr_t)room + pmd - 1) & -pmd);
    room = mmap(room, length, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, offset);
    madvise(room, length, MADV_HUGEPAGE);
    madvise(room, length, POPULATE_READ);
    return room;
}

/* Map a span for a moment, collapsed if that is wanted, and see in smaps
 * whether all of it is huge; note how much is, and whether others map it. */
static bool
is_huge(int fd, struct span *span, bool collapse)
{
    char line[8192]; /* a path is at most half as long */
    unsigned long start, end, kib;
    void *there = map_range(fd, span->offset, span->length);
    bool ours = false;

    if (collapse && madvise(there, span->length, COLLAPSE) && errno == EAGAIN)
        madvise(there, span->length, COLLAPSE);
    span->huge = span->shared = 0;
    FILE *smaps = fopen("/proc/self/smaps", "re");
    while (smaps && fgets(line, sizeof line, smaps))
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            ours = start == (uintptr_t)there;
        else if (ours && sscanf(line, "%*[^:]: %lu", &kib) == 1) {
            span->huge += strstr(line, "PmdMapped:") ? kib << 10 : 0;
            span->shared |= kib && !strncmp(line, "Shared_", 7);
        }
    if (smaps)
        fclose(smaps);
    munmap(there, span->length);
    return span->huge == span->length;
}

/* Have a span in memory on huge pages: as it is, collapsed in place, or
 * dropped from the cache and read anew, which changes nothing about pages that
 * others map.  That is tried a few times: a kernel that has no huge page just
 * now begins to make some.  Nothing is dropped any more once it gives none.
 * Returns what was done, or why not all of it is huge. */
static const char *
bring_in(int fd, struct span *span)
{
    struct span block = {.offset = span->offset, .length = pmd};
    bool shared = false;

    if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1)
        return ": huge pages are disabled here (PR_SET_THP_DISABLE)";
    if (is_huge(fd, span, false))
        return "";
    fdatasync(fd); /* dirty pages are not dropped */
    if (is_huge(fd, span, true))
        return ", collapsed";
    for (size_t left = span->length; left; left -= pmd, block.offset += pmd) {
        for (int tries = 4; !is_huge(fd, &block, false) && tries;
             tries = block.shared ? 0 : tries - 1)
            posix_fadvise(fd, block.offset, pmd, POSIX_FADV_DONTNEED);
        if (block.huge < pmd && !block.shared)
            break;
        shared |= block.huge < pmd;
    }
    if (is_huge(fd, span, false))
        return ", read anew";
    return shared ? ": other processes map it in small pages"
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
    size_t page = getpagesize();

    if (fstat(fd, &status) || !S_ISREG(status.st_mode))
        return "not a regular file";
    /* To read the header must not bring the first pages in small pieces. */
    munmap(map_range(fd, 0, pmd), pmd);
    if (pread(fd, &file, sizeof file, 0) != sizeof file
        || memcmp(file.e_ident, ELFMAG "\2", EI_CLASS + 1) /* ELFCLASS64 */
        || file.e_phentsize != sizeof load)
        return "not a 64-bit ELF file";
    for (off_t at = file.e_phoff; file.e_phnum--; at += sizeof load) {
        if (pread(fd, &load, sizeof load, at) != sizeof load)
            break;
        uint64_t from = (load.p_offset + pmd - 1) & -pmd;
        uint64_t to = (load.p_offset + load.p_filesz + page - 1) & -pmd;
        if (load.p_type == PT_LOAD && (load.p_flags & 7) == (PF_R | PF_X)
            && !((load.p_vaddr - load.p_offset) % pmd)
            && (load.p_align >= pmd || file.e_type == ET_EXEC) && to > from
            && to - from > span->length)
            *span = (struct span){.offset = from, .length = to - from};
    }
    if (span->length / page > (size_t)sysconf(_SC_PHYS_PAGES) / 4)
        return "larger than a quarter of the memory";
    return span->length ? NULL : "not aligned (see page-primer align)";
}

/* Warm one file, and lock it if that is wanted.  Prints a line about it. */
static bool
warm(const char *path)
{
    struct span span = {0};
    int fd = open(path, OPEN_ANY);
    const char *refusal = fd < 0 ? strerror(errno) : find_span(fd, &span);
    bool found = fd >= 0 && !refusal;
    const char *done = found ? bring_in(fd, &span) : "";
    bool locked = hold && found
        && !mlock(map_range(fd, span.offset, span.length), span.length);
    bool good = found && span.huge == span.length && locked == hold;
    FILE *to = good ? successes : failures;

    if (to && !found)
        fprintf(to, "%s: not warmed: %s\n", path, refusal);
    else if (to)
        fprintf(to, "%s: %zu of %zu KiB on huge pages%s%s\n", path,
                span.huge >> 10, span.length >> 10, done,
                locked == hold ? "" : ": not held (RLIMIT_MEMLOCK)");
    held |= locked;
    close(fd);
    return good;
}

/* Warm the files of a list, absolute paths, one a line: the one that is named
 * in the environment, or else root's. */
static bool
warm_listed(void)
{
    static char text[1 << 20]; /* the last character stays 0 */
    const char *name = getenv("PAGE_PRIMER_ALIGNED");
    bool named = name && *name;
    int fd = open(named ? name : "/var/lib/page-primer/aligned", OPEN_ANY);
    ssize_t size = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    bool good = size >= 0 || !named;

    if (!good)
        warn("%s", name);
    close(fd);
    for (char *line = text, *end; line < text + size; line = end + 1) {
        end = line + strcspn(line, "\n");
        *end = 0;
        if (*line == '/')
            good &= warm(line);
    }
    return good;
}

int
main(int argc, char **argv)
{
    bool quiet = false;
    int word, paths = 0;

    /* With --hold there is no COMMAND: then `--` is no option, either. */
    for (word = 1; word < argc && (hold || strcmp(argv[word], "--")); word++)
        if (!strcmp(argv[word], "-q"))
            quiet = true;
        else if (!strcmp(argv[word], "--hold"))
            hold = true;
        else if (*argv[word] == '-')
            return fputs(usage, stderr), 2;
        else
            argv[paths++] = argv[word];
    char **command = word + 1 < argc ? argv + word + 1 : NULL;
    /* A page of entries of 8 bytes each spans a huge page. */
    pmd = (size_t)getpagesize() * getpagesize() / 8;
    failures = quiet ? NULL : command ? stderr : stdout;
    successes = command ? NULL : failures;

    /* A closed pipe or `ulimit -f` must not end us; COMMAND finds both signals
     * as they were.  Closed stdio needs nothing: what is opened in its place
     * is open for reading only. */
    if (hold) /* for a container's first process nothing is the default */
        signal(SIGTERM, getpid() == 1 ? _exit : SIG_DFL);
    void (*pipe)(int) = signal(SIGPIPE, SIG_IGN);
    void (*limit)(int) = signal(SIGXFSZ, SIG_IGN);
    bool good = paths || warm_listed();
    for (int i = 0; i < paths; i++)
        good &= warm(argv[i]);
    fflush(stdout);
    for (; held; pause()) /* for a signal that our caller had blocked, too */
        sigprocmask(SIG_SETMASK, &(sigset_t){0}, NULL);
    if (!command)
        return !good;
    signal(SIGPIPE, pipe);
    signal(SIGXFSZ, limit);
    execvp(*command, command);
    signal(SIGPIPE, SIG_IGN); /* to say so must not end us, either */
    signal(SIGXFSZ, SIG_IGN);
    err(errno == ENOENT || errno == ENOTDIR ? 127 : 126, "%s", *command);
}
