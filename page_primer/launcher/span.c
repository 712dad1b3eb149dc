/* The part of an aligned file that can be huge, and how it is mapped. */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "warm.h"

#define POPULATE_READ 22 /* MADV_POPULATE_READ, Linux 5.14 */
enum { MOST_HEADERS = 65536 / sizeof(Elf64_Phdr) };

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
    if (madvise(there, length, POPULATE_READ) && errno == EINVAL
        && !syscall(SYS_mlock, there, length))
        syscall(SYS_munlock, there, length);
    return there;
}

/* Find the longest run of read-only PT_LOADs with code that is one mapping:
 * adjacent, and congruent modulo a huge page.  Of an aligned file there may be
 * several, where one was made of headers, code and constants.  An object is
 * placed by the largest p_align it has, an ET_EXEC by its addresses.  Returns
 * NULL, or why there is no whole huge page. */
static const char *
find_span(int fd, struct span *span)
{
    const uint64_t page = getpagesize();
    uint64_t memory = (uint64_t)sysconf(_SC_PHYS_PAGES) * page;
    uint64_t start = 0, end = 0, bias = 0, largest = 0;
    Elf64_Ehdr file;
    Elf64_Phdr load;
    struct stat status;

    span->length = 0;
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
    for (int i = 0; i < file.e_phnum && i < MOST_HEADERS; i++) {
        off_t at = file.e_phoff + i * sizeof load;
        if (pread(fd, &load, sizeof load, at) != sizeof load)
            return "truncated";
        if (load.p_type != PT_LOAD)
            continue;
        uint64_t size = status.st_size, offset = load.p_offset;
        if (offset > size || load.p_filesz > size - offset)
            return "truncated";
        largest = load.p_align > largest ? load.p_align : largest;
        if ((load.p_flags & (PF_R | PF_W | PF_X)) != (PF_R | PF_X)
            || (load.p_vaddr - offset) % pmd) {
            end = 0;
            continue;
        }
        if (!end || (offset & -page) > end || load.p_vaddr - offset != bias)
            start = offset & -page;
        bias = load.p_vaddr - offset;
        end = (offset + load.p_filesz + page - 1) & -page;
        uint64_t from = (start + pmd - 1) & -pmd, to = end & -pmd;
        if (to > from && to - from > span->length)
            *span = (struct span){from, to - from};
        if (load.p_memsz > load.p_filesz)
            end = 0;
    }
    if (!span->length || (largest < pmd && file.e_type != ET_EXEC))
        return "not aligned (see page-primer align)";
    return span->length > memory / 4 ? "larger than a quarter of the memory"
                                     : NULL;
}

/* Returns a descriptor, or -1 and why.  Neither a FIFO nor a terminal makes it
 * wait or does anything to the caller. */
int
open_target(const char *path, struct span *span, const char **why)
{
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    *why = fd < 0 ? strerror(errno) : find_span(fd, span);
    if (fd >= 0 && *why)
        close(fd);
    return *why ? -1 : fd;
}
