/* pagetrace.c - QEMU user-mode plugin: record the page sequence of a region.
 *
 * The region is delimited by calls of clock_gettime(CLOCK_PROCESS_CPUTIME_ID)
 * (Python's time.process_time()): from call number FIRST on, calls alternately
 * begin and end a traced interval, COUNT calls in all.
 *
 * Arguments: out=FILE,first=N,count=N,data=0|1
 *
 * FILE: u32 records, in execution order, all threads merged (as if they shared
 * one core):
 *     bits 31..15  page id          bits 14..1  instructions fetched from it
 *     bit 0        1 = load/store   (then bits 14..1 are 0)
 * Consecutive fetches from one page are one record.  Loads and stores pass a
 * 16-entry LRU filter first, smaller than any first-level data TLB simulated.
 * FILE.pages: one hexadecimal guest page number per line, line N is page id N.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>

/* The part of QEMU's plugin API (version 1) used here; Debian ships no header. */
typedef uint64_t qemu_plugin_id_t;
typedef struct qemu_info_t qemu_info_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint32_t qemu_plugin_meminfo_t;
typedef void (*vcpu_udata_cb)(unsigned, void *);
typedef void (*vcpu_mem_cb)(unsigned, qemu_plugin_meminfo_t, uint64_t, void *);
extern void
qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t,
                                      void (*)(qemu_plugin_id_t,
                                               struct qemu_plugin_tb *));
extern void
qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, vcpu_udata_cb,
                                     int flags, void *);
extern void
qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, vcpu_mem_cb,
                                 int flags, int rw, void *);
extern size_t
qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *
qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern uint64_t
qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
extern size_t
qemu_plugin_insn_size(const struct qemu_plugin_insn *);
extern void
qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t,
                                     void (*)(qemu_plugin_id_t, unsigned,
                                              int64_t, uint64_t, uint64_t,
                                              uint64_t, uint64_t, uint64_t,
                                              uint64_t, uint64_t, uint64_t));
extern void
qemu_plugin_register_atexit_cb(qemu_plugin_id_t,
                               void (*)(qemu_plugin_id_t, void *), void *);
enum { CB_NO_REGS = 0, MEM_RW = 3 };

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum {
    ID_BITS = 17,
    CNT_BITS = 14,
    CNT_MAX = (1 << CNT_BITS) - 1,
    IDS = 1 << ID_BITS,
    HASH = 4 * IDS,
    FILTER = 16
};

static long first = 1, count = 2, marks;
static bool active, want_data;
static FILE *out, *pages_out;
static uint64_t key[HASH]; /* guest page + 1 */
static uint32_t val[HASH], n_ids;
static uint64_t cur_page; /* the code record being built, if open */
static uint32_t cur_count;
static bool open;
static uint64_t filter[FILTER];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint32_t
page_id(uint64_t page)
{
    uint32_t h = (page * 0x9e3779b97f4a7c15ull) >> 40 & (HASH - 1);
    while (key[h] && key[h] != page + 1)
        h = (h + 1) & (HASH - 1);
    if (!key[h]) {
        if (n_ids == IDS) {
            fprintf(stderr, "pagetrace: too many pages\n");
            abort();
        }
        key[h] = page + 1;
        val[h] = n_ids++;
        fprintf(pages_out, "%" PRIx64 "\n", page);
    }
    return val[h];
}

static void
put(uint64_t page, uint32_t n, uint32_t is_data)
{
    uint32_t rec = page_id(page) << (CNT_BITS + 1) | n << 1 | is_data;
    fwrite_unlocked(&rec, 4, 1, out);
}

static void
flush_code(void)
{
    if (open)
        put(cur_page, cur_count, 0);
    open = false;
    cur_count = 0;
}

static void
fetch(uint64_t page, uint32_t n)
{
    if (!open || page != cur_page || cur_count + n > CNT_MAX) {
        flush_code();
        cur_page = page;
        open = true;
    }
    cur_count += n;
}

/* A translation block touches at most three pages (QEMU ends blocks at page
 * boundaries; first and last instruction may straddle one). */
struct run {
    uint8_t n;
    struct {
        uint64_t page;
        uint32_t insns;
    } part[3];
};

static void
on_exec(unsigned cpu, void *arg)
{
    const struct run *r = arg;
    if (!active)
        return;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < r->n; i++)
        fetch(r->part[i].page, r->part[i].insns);
    pthread_mutex_unlock(&lock);
}

static void
on_mem(unsigned cpu, qemu_plugin_meminfo_t info, uint64_t va, void *arg)
{
    uint64_t page = va >> 12;
    if (!active || filter[0] == page)
        return;
    pthread_mutex_lock(&lock);
    int i = 1;
    while (i < FILTER && filter[i] != page)
        i++;
    bool miss = i == FILTER;
    memmove(filter + 1, filter, (miss ? FILTER - 1 : i) * sizeof *filter);
    filter[0] = page;
    if (miss) {
        flush_code();
        put(page, 0, 1);
    }
    pthread_mutex_unlock(&lock);
}

static void
on_trans(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    struct run *r = calloc(1, sizeof *r);
    size_t n = qemu_plugin_tb_n_insns(tb);
    for (size_t i = 0; i < n; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint64_t va = qemu_plugin_insn_vaddr(insn);
        uint64_t p[2] = {va >> 12,
                         (va + qemu_plugin_insn_size(insn) - 1) >> 12};
        for (int k = 0; k < 1 + (p[1] != p[0]); k++) {
            if (!r->n || r->part[r->n - 1].page != p[k]) {
                if (r->n == 3)
                    break;
                r->part[r->n++].page = p[k];
            }
            r->part[r->n - 1].insns += k == 0;
        }
        if (want_data)
            qemu_plugin_register_vcpu_mem_cb(insn, on_mem, CB_NO_REGS, MEM_RW,
                                             NULL);
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_exec, CB_NO_REGS, r);
}

static void
on_syscall(qemu_plugin_id_t id, unsigned cpu, int64_t num, uint64_t a1,
           uint64_t a2, uint64_t a3, uint64_t a4, uint64_t a5, uint64_t a6,
           uint64_t a7, uint64_t a8)
{
    if (num != SYS_clock_gettime || a1 != CLOCK_PROCESS_CPUTIME_ID)
        return;
    pthread_mutex_lock(&lock);
    long n = ++marks - first;
    active = n >= 0 && n < count && n % 2 == 0;
    if (!active) {
        flush_code();
        fflush(out);
        fflush(pages_out);
    }
    pthread_mutex_unlock(&lock);
}

static void
at_exit(qemu_plugin_id_t id, void *arg)
{
    active = false;
    flush_code();
    fclose(out);
    fclose(pages_out);
}

EXPORT int
qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc,
                    char **argv)
{
    char name[4096];
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            snprintf(name, sizeof name, "%s.pages", argv[i] + 4);
            out = fopen(argv[i] + 4, "wb");
            pages_out = fopen(name, "w");
        } else if (!strncmp(argv[i], "first=", 6))
            first = atol(argv[i] + 6);
        else if (!strncmp(argv[i], "count=", 6))
            count = atol(argv[i] + 6);
        else if (!strncmp(argv[i], "data=", 5))
            want_data = atoi(argv[i] + 5);
    }
    if (!out || !pages_out) {
        fprintf(stderr, "pagetrace: cannot write output\n");
        return -1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_trans);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, at_exit, NULL);
    return 0;
}
