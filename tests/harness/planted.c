/* What each sanitizer must find, so that its silence about the core says
 * something: built, loaded and judged by tools/sanitize as the core is. */

#include <limits.h>
#include <pthread.h>
#include <stdlib.h>

static volatile int where = 16, large = INT_MAX, counter;
static char *volatile kept;

int
overflow(void)
{
    kept = malloc(16);
    kept[where] = 1;
    return 0;
}

int
undefined(void)
{
    return large + 1;
}

int
leak(void)
{
    for (int i = 0; i < 20; i++)
        kept = malloc(1000);
    kept = NULL;
    return 0;
}

static void *
count(void *argument)
{
    for (int i = 0; i < 1000; i++)
        counter++;
    return argument;
}

int
race(void)
{
    pthread_t threads[2];

    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, count, NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    return 0;
}
