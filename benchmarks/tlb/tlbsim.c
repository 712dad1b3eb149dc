/* tlbsim.c - two-level TLB simulator for traces written by pagetrace.c.
 *
 * True LRU, no prefetch, no wrong-path fetch, no kernel code.  A walk fills both
 * levels; the levels are neither inclusive nor exclusive.
 *
 * A tag is  asid << 56 | page number << 2 | size class (0: 4K, 1: 16K, 2: 2M),
 * the page number being in units of the page's own size.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct geometry {
    uint32_t l1_sets, l1_ways; /* 4K and 16K entries (2M as well if ... */
    uint32_t
        l1_2m_ways; /* ... this is 0), else 2M entries, fully associative */
    uint32_t l2_sets, l2_ways; /* all sizes */
    uint32_t
        l1d_ways; /* first-level data TLB in front of a shared L2; 0: no data */
    uint32_t l2d_sets,
        l2d_ways; /* a second level of its own for data; 0: shared */
};

struct result {
    uint64_t insns, fetches, l1_misses, walks, data_walks;
};

struct tlb {
    uint32_t sets, ways, hashed;
    uint64_t *tag;
};

static struct tlb
make(uint32_t sets, uint32_t ways, uint32_t hashed)
{
    struct tlb t = {sets, ways, hashed, malloc((size_t)sets * ways * 8)};
    memset(t.tag, 0xff, (size_t)sets * ways * 8);
    return t;
}

/* Look up and make most recently used, evicting the least recently used entry
 * of the set if absent.  Returns 1 on a hit. */
static inline int
touch(struct tlb *t, uint64_t tag)
{
    uint64_t vpn = tag << 8 >> 10;
    if (t->hashed)
        vpn ^= vpn / t->sets;
    uint64_t *e = t->tag + (vpn & (t->sets - 1)) * t->ways;
    if (e[0] == tag)
        return 1;
    uint64_t carry = e[0];
    e[0] = tag;
    for (uint32_t i = 1; i < t->ways; i++) {
        uint64_t next = e[i];
        e[i] = carry;
        if (next == tag)
            return 1;
        carry = next;
    }
    return 0;
}

static void
flush(struct tlb *t)
{
    memset(t->tag, 0xff, (size_t)t->sets * t->ways * 8);
}

/* WORKERS address spaces play the trace cyclically from evenly spaced starting
 * points, taking turns of QUANTUM instructions.  One full pass of every worker
 * warms the TLBs, the next is counted; BY_PAGE, unless it is NULL, gets the walks
 * of each page id. */
void
simulate(const uint32_t *rec, size_t n, const uint64_t *tag,
         const struct geometry *g, uint32_t workers, uint64_t quantum,
         uint32_t flush_on_switch, struct result *out, uint64_t *by_page)
{
    struct tlb l1 = make(g->l1_sets, g->l1_ways, 0);
    struct tlb l1h = make(1, g->l1_2m_ways ? g->l1_2m_ways : 1, 0);
    struct tlb l1d = make(1, g->l1d_ways ? g->l1d_ways : 1, 0);
    struct tlb l2 = make(g->l2_sets, g->l2_ways, 1);
    struct tlb l2d =
        make(g->l2d_sets ? g->l2d_sets : 1, g->l2d_ways ? g->l2d_ways : 1, 1);
    size_t *pos = malloc(workers * sizeof *pos);
    for (uint32_t w = 0; w < workers; w++)
        pos[w] = n / workers * w;

    struct result r = {0};
    uint32_t w = 0;
    uint64_t ran = 0, warm = (uint64_t)n * workers;
    for (uint64_t step = 0; step < 2 * warm; step++) {
        if (step == warm)
            memset(&r, 0, sizeof r);
        uint32_t x = rec[pos[w]];
        if (++pos[w] == n)
            pos[w] = 0;
        uint64_t t = tag[x >> 15] | (uint64_t)w << 56;
        if (x & 1) {
            if (g->l1d_ways && !touch(&l1d, t)
                && !touch(g->l2d_ways ? &l2d : &l2, t)) {
                r.data_walks++;
                if (by_page && step >= warm)
                    by_page[x >> 15]++;
            }
            continue;
        }
        uint32_t insns = x >> 1 & 0x3fff;
        r.insns += insns;
        r.fetches++;
        if (!touch(g->l1_2m_ways && (t & 3) == 2 ? &l1h : &l1, t)) {
            r.l1_misses++;
            if (!touch(&l2, t)) {
                r.walks++;
                if (by_page && step >= warm)
                    by_page[x >> 15]++;
            }
        }
        ran += insns;
        if (workers > 1 && ran >= quantum) {
            ran = 0;
            w = w + 1 == workers ? 0 : w + 1;
            if (flush_on_switch) {
                flush(&l1);
                flush(&l1h);
                flush(&l1d);
                flush(&l2);
                flush(&l2d);
            }
        }
    }
    *out = r;
    free(l1.tag);
    free(l1h.tag);
    free(l1d.tag);
    free(l2.tag);
    free(l2d.tag);
    free(pos);
}

/* How often each page id is fetched from (visits[id]) and how many
 * instructions run there (insns[id]). */
void
histogram(const uint32_t *rec, size_t n, uint64_t *visits, uint64_t *insns)
{
    for (size_t i = 0; i < n; i++)
        if (!(rec[i] & 1)) {
            visits[rec[i] >> 15]++;
            insns[rec[i] >> 15] += rec[i] >> 1 & 0x3fff;
        }
}
