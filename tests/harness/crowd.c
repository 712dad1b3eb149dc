/* Threads without Python's lock, that execute the interpreter's code and load
 * and unload a library, until told to stop: crowd_start(n, path), crowd_stop().
 */

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

#define MOST 256

static pthread_t threads[MOST];
static int running;
static atomic_int stop, wrong;
static atomic_long rounds;
static const char *library;

static void *
work(void *argument)
{
    /* Of the interpreter; neither takes its lock. */
    int (*compare)(const char *, const char *) =
        (int (*)(const char *, const char *))dlsym(RTLD_DEFAULT,
                                                   "PyOS_mystricmp");
    const char *(*platform)(void) =
        (const char *(*)(void))dlsym(RTLD_DEFAULT, "Py_GetPlatform");

    (void)argument;
    while (!atomic_load(&stop)) {
        void *handle = dlopen(library, RTLD_NOW);
        int (*small)(void) =
            handle ? (int (*)(void))dlsym(handle, "small") : NULL;
        if (small == NULL || small() != 42)
            atomic_fetch_add(&wrong, 1);
        for (int i = 0; i < 500; i++)
            if (compare("Priming", "pRIMING") != 0 || platform()[0] == '\0')
                atomic_fetch_add(&wrong, 1);
        if (handle != NULL)
            dlclose(handle);
        atomic_fetch_add(&rounds, 1);
        usleep(60000); /* there may be few processors */
    }
    return NULL;
}

int
crowd_start(int count, const char *path)
{
    library = path;
    atomic_store(&stop, 0);
    for (running = 0; running < count && running < MOST; running++)
        if (pthread_create(&threads[running], NULL, work, NULL) != 0)
            break;
    return running;
}

/* The number of rounds that went well, or -1. */
long
crowd_stop(void)
{
    atomic_store(&stop, 1);
    while (running > 0)
        pthread_join(threads[--running], NULL);
    return atomic_load(&wrong) ? -1 : atomic_load(&rounds);
}
