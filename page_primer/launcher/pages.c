/* The pages of an aligned file: have them in memory as huge ones.
 *
 * The page cache keeps a file in pieces of the size that its first reader or
 * writer caused: 2 MiB where that was a mapping advised MADV_HUGEPAGE, less
 * where it was ld.so or the unpacking of an image. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "warm.h"

#define COLLAPSE 25 /* MADV_COLLAPSE, Linux 6.1 */

/* Bytes of a mapping on huge pages, and those that others map too (smaps). */
struct view {
    size_t huge, shared;
};

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
        else if (here
                 && (sscanf(line, "FilePmdMapped: %lu", &kib) == 1
                     || sscanf(line, "ShmemPmdMapped: %lu", &kib) == 1))
            view.huge += kib << 10;
        else if (here
                 && (sscanf(line, "Shared_Clean: %lu", &kib) == 1
                     || sscanf(line, "Shared_Dirty: %lu", &kib) == 1))
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
