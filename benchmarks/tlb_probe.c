/* Chase pointers over small and over huge pages: nanoseconds an access.
 *
 * One pointer a page, at a random line of it, in random order.  Where a
 * hypervisor backs this machine's memory with small pages, what the guest maps
 * huge has no huge TLB entry, and the gain that is left is a shorter walk.
 */

#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

enum { PAGE = 4096, LINE = 64, ACCESSES = 10000000 };

static const size_t HUGE = 2 << 20;
static uint64_t state = 88172645463325252ULL;

static uint64_t
random_number(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

static double
chase(size_t pages, int advice)
{
    size_t size = pages * PAGE;
    char *area = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char **slots = calloc(pages, sizeof(*slots));
    struct timespec from, to;
    char **at;

    if (area == MAP_FAILED || slots == NULL)
        exit(1);
    char *start = (char *)(((uintptr_t)area + HUGE - 1) & ~(HUGE - 1));
    madvise(start, size, advice);
    for (size_t i = 0; i < pages; i++)
        slots[i] = start + i * PAGE + random_number() % (PAGE / LINE) * LINE;
    for (size_t i = pages - 1; i > 0; i--) {
        size_t other = random_number() % (i + 1);
        char *swapped = slots[i];
        slots[i] = slots[other];
        slots[other] = swapped;
    }
    for (size_t i = 0; i < pages; i++)
        *(char **)slots[i] = slots[(i + 1) % pages];
    at = (char **)slots[0];
    for (size_t i = 0; i < pages; i++)
        at = (char **)*at;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (size_t i = 0; i < ACCESSES; i++)
        at = (char **)*at;
    __asm__ volatile("" : : "r"(at));
    clock_gettime(CLOCK_MONOTONIC, &to);
    munmap(area, size + HUGE);
    free(slots);
    return ((double)(to.tv_sec - from.tv_sec) * 1e9
            + (double)(to.tv_nsec - from.tv_nsec))
        / ACCESSES;
}

int
main(void)
{
    for (size_t pages = 512; pages <= 32768; pages *= 4) {
        double small = chase(pages, MADV_NOHUGEPAGE);
        double huge = chase(pages, MADV_HUGEPAGE);
        printf("%zu %.2f %.2f\n", pages, small, huge);
    }
    return 0;
}
