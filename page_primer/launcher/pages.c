/* The pages of an aligned file: find those that can be huge, have them so.
 *
 * The page cache keeps a file in pieces of the size that its first reader or
 * writer caused: 2 MiB where that was a mapping advised MADV_HUGEPAGE, less
 * where it was ld.so or the unpacking of an image. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "warm.h"

#define POPULATE_READ 22 /* MADV_POPULATE_READ, Linux 5.14 */
#define COLLAPSE 25      /* MADV_COLLAPSE, Linux 6.1 */
enum { MOST_HEADERS = 65536 / sizeof(Elf64_Phdr) };

/* Bytes of a mapping on huge pages, and those that others map too (smaps). */
struct view {
    size_t huge, shared;
};

size_t pmd = 2 << 20;

/* Map a range as a loader does, at a boundary, and fault it in.  Nothing here
 * touches it: a file truncated meanwhile is an error, not a SIGBUS. */
char *
map_range(int fd, off_t offset, size_t length)
{
    char *room = mmap(NULL, length + pmd, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    size_t before = -(uintptr_t)room & (pmd - 1);
    char *there = mmap(room + before, length, PROT_READ | PROT_EXEC,
                       MAP_PRIVATE | MAP_FIXED, fd, offset);
    munmap(room, there == MAP_FAILED ? length + pmd : before);
    if (there == MAP_FAILED)
        return NULL;
    munmap(there + length, pmd - before);
    madvise(there, length, MADV_HUGEPAGE);
    if (madvise(there, length, POPULATE_READ) && errno == EINVAL &&
        !syscall(SYS_mlock, there, length))
        syscall(SYS_munlock, there, length);
    return there;
}

/* Find the executable PT_LOAD that the loader puts at a huge page's boundary.
 * Returns NULL, or why there is none. */
static const char *
find_span(int fd, struct span *span)
{
    Elf64_Ehdr file;
    Elf64_Phdr load;
    struct stat status;
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * getpagesize();

    span->length = 0;
    if (fstat(fd, &status) || !S_ISREG(status.st_mode))
        return "not a regular file";
    /* To read the header must not bring the first pages in small pieces. */
    char *first = map_range(fd, 0, pmd);
    if (first)
        munmap(first, pmd);
    if (pread(fd, &file, sizeof file, 0) != sizeof file ||
        memcmp(file.e_ident, ELFMAG "\2", EI_CLASS + 1) /* ELFCLASS64 */ ||
        file.e_phentsize != sizeof load)
        return "not a 64-bit ELF file";
    for (int i = 0; i < file.e_phnum && i < MOST_HEADERS; i++) {
        off_t at = file.e_phoff + i * sizeof load;
        if (pread(fd, &load, sizeof load, at) != sizeof load)
            return "truncated";
        if (load.p_type != PT_LOAD || (load.p_flags & (PF_X | PF_W)) != PF_X ||
            !load.p_align || load.p_align % pmd ||
            (load.p_vaddr - load.p_offset) % pmd)
            continue;
        uint64_t size = status.st_size;
        if (load.p_offset > size || load.p_filesz > size - load.p_offset)
            return "truncated";
        uint64_t start = (load.p_offset + pmd - 1) & -pmd;
        uint64_t end = (load.p_offset + load.p_filesz) & -pmd;
        if (end > start && end - start > span->length)
            *span = (struct span){start, end - start};
    }
    if (span->length > memory / 4)
        return "larger than a quarter of the memory";
    return span->length ? NULL : "not aligned (see page-primer align)";
}

int
open_target(const char *path, struct span *span, const char **why)
{
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    *why = fd < 0 ? strerror(errno) : find_span(fd, span);
    if (fd >= 0 && *why)
        close(fd);
    return *why ? -1 : fd;
}

static struct view
look_at(const char *there)
{
    struct view view = {0, 0};
    unsigned long start, end, kib;
    char line[PATH_MAX + 128];
    bool here = false;
    FILE *file = fopen("/proc/self/smaps", "re");

    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            here = start == (unsigned long)there;
        else if (here && (sscanf(line, "FilePmdMapped: %lu", &kib) == 1 ||
                          sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1))
            view.huge += kib << 10;
        else if (here && (sscanf(line, "Shared_Clean: %lu", &kib) == 1 ||
                          sscanf(line, "Shared_Dirty: %lu", &kib) == 1))
            view.shared += kib << 10;
    if (file)
        fclose(file);
    return view;
}

/* One huge page of the file: look, collapse in place, look; where that does
 * not do, drop it from the cache and read it anew.  That changes nothing about
 * pages that others map, or that are dirty. */
static struct view
read_chunk(int fd, off_t offset, bool drop, const char **done)
{
    struct view view = {0, 0};
    char *there = map_range(fd, offset, pmd);

    if (!there)
        return view;
    view = look_at(there);
    if (view.huge < pmd) {
        if (madvise(there, pmd, COLLAPSE) && errno == EAGAIN)
            madvise(there, pmd, COLLAPSE);
        view = look_at(there);
        if (view.huge == pmd)
            *done = "collapsed";
    }
    munmap(there, pmd);
    if (view.huge == pmd || !drop)
        return view;
    posix_fadvise(fd, offset, pmd, POSIX_FADV_DONTNEED);
    there = map_range(fd, offset, pmd);
    if (!there)
        return view;
    view = look_at(there);
    if (view.huge == pmd)
        *done = "read anew";
    munmap(there, pmd);
    return view;
}

/* Have a span in memory on huge pages.  Nothing is dropped where all of it is;
 * nor any more once the kernel has no huge page to give. */
struct outcome
bring_in(int fd, const struct span *span)
{
    struct outcome outcome = {0, false, NULL, NULL};
    bool drop = true;
    char *there = map_range(fd, span->offset, span->length);

    if (!there)
        outcome.why = strerror(errno);
    else if (prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1)
        outcome.why = "huge pages are disabled here (PR_SET_THP_DISABLE)";
    if (outcome.why)
        return outcome;
    outcome.huge = look_at(there).huge;
    munmap(there, span->length);
    if (outcome.huge == span->length)
        return outcome;
    fdatasync(fd); /* dirty pages are not dropped */
    outcome.huge = 0;
    for (size_t at = 0; at < span->length; at += pmd) {
        struct view view =
            read_chunk(fd, span->offset + at, drop, &outcome.done);
        outcome.huge += view.huge;
        if (view.huge < pmd && view.shared) {
            outcome.held = true;
            outcome.why = "other processes map it in small pages";
        } else if (view.huge < pmd && drop) {
            outcome.why = "the kernel gave no huge page";
            drop = false;
        }
    }
    return outcome;
}
