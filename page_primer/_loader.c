/* page_primer._core, the loader's lock and forks.
 *
 * A child that is forked while another thread has the loader's lock has it
 * held for ever, and hangs in its next dlopen(3) or dl_iterate_phdr(3).  Not
 * all of our uses of it are in alone() (status(), the look after an import),
 * and not all forks are os.fork().  So forks and uses wait for each other, but
 * only for a second: a fork's other handlers may wait for the very thread.
 * With atomics alone, since the handler of a fatal signal may fork anywhere;
 * then the thread may be in the section itself, and the child leave it, too.
 */

#include "_core.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

#define FORKERS 16 /* for more at one time nobody waits */
static _Atomic(pthread_t) forkers[FORKERS]; /* threads that fork now; or 0 */
static atomic_uint in_loader;

#define PAUSE 50 /* microseconds */

static struct timespec
now(void)
{
    struct timespec time = {0, 0};

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time;
}

/* Whether a second has passed since then. */
static bool
is_over(struct timespec then)
{
    struct timespec time = now();

    return time.tv_sec > then.tv_sec + 1
        || (time.tv_sec == then.tv_sec + 1 && time.tv_nsec >= then.tv_nsec);
}

/* Whether another thread forks, and not this one: what a handler of its own
 * fork does need not wait. */
static bool
is_forking(void)
{
    bool found = false;

    for (int i = 0; i < FORKERS; i++) {
        pthread_t one = atomic_load(&forkers[i]);

        if (one && pthread_equal(one, pthread_self()))
            return false;
        found = found || one;
    }
    return found;
}

void
leave_loader(void)
{
    unsigned inside = atomic_load(&in_loader);

    /* 0 in a child that was forked inside. */
    while (inside
           && !atomic_compare_exchange_weak(&in_loader, &inside, inside - 1))
        ;
}

void
enter_loader(void)
{
    struct timespec began = now();

    for (;;) {
        while (is_forking() && !is_over(began))
            (void)usleep(PAUSE);
        atomic_fetch_add(&in_loader, 1);
        if (!is_forking() || is_over(began)) /* none began meanwhile */
            return;
        leave_loader();
    }
}

static void
before_any_fork(void)
{
    struct timespec began = now();

    for (int i = 0; i < FORKERS; i++) {
        pthread_t none = 0;

        if (atomic_compare_exchange_strong(&forkers[i], &none, pthread_self()))
            break;
    }
    while (atomic_load(&in_loader) && !is_over(began))
        (void)usleep(PAUSE);
}

static void
after_any_fork(void)
{
    for (int i = FORKERS - 1; i >= 0; i--) {
        pthread_t mine = pthread_self();

        if (atomic_compare_exchange_strong(&forkers[i], &mine, (pthread_t)0))
            return;
    }
}

static void
in_any_child(void)
{
    for (int i = 0; i < FORKERS; i++)
        atomic_store(&forkers[i], (pthread_t)0);
    atomic_store(&in_loader, 0);
}

__attribute__((constructor)) static void
prepare(void)
{
    pthread_atfork(before_any_fork, after_any_fork, in_any_child);
}
