/* page_primer._core, one call at a time, also over forks and signals.
 *
 * In C because a signal handler's exception can come at any bytecode: between
 * the acquisition of a lock and the "try" that releases it, or at the entry of
 * a fork hook, before a line of it has run.  Nothing here executes bytecode but
 * the call itself and, where it is asked to, the handlers.
 *
 * A fork waits for a call that is under way in another thread, or the child
 * would inherit half of it, and perhaps the loader's lock.  Calls stand back
 * for a fork that waits, so that threads that call without pause do not starve
 * it.  One lock for the process, also where interpreters have a GIL each.
 */

#include "_core.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

/* Of what follows.  Never held over a fork: other libraries' pthread_atfork()
 * handlers may run Python, and call this, or wait for whoever does. */
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed;
static atomic_bool held; /* set last and cleared first: a child inherits all */
static pthread_t holder; /* while held */
static bool running;     /* the holder's call is under way */
static sigset_t before;  /* the signals that its thread blocked before it */
static bool by_fork;     /* taken by a fork, which may call meanwhile */
static unsigned forks_waiting;
static unsigned long forks; /* between the first process and this one */

/* Seconds that are waited for another thread.  Never for ever: whatever keeps
 * it, the host goes on, unprimed. */
#define LONGEST 10

/* Of the thread's own doing: to block them would be to die of them without a
 * trace. */
static const int synchronous[] = {SIGSEGV, SIGBUS,  SIGFPE, SIGILL,
                                  SIGTRAP, SIGABRT, SIGSYS};

/* ---------------------------------------------------------------- lock --- */

static void
make_condition(void)
{
    pthread_condattr_t attributes;

    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&changed, &attributes);
    pthread_condattr_destroy(&attributes);
}

/* The guard must be held, here and below, until the thread's own functions. */
static bool
is_mine(void)
{
    return held && pthread_equal(holder, pthread_self());
}

static void
let_go(void)
{
    held = false;
    running = by_fork = false;
    pthread_cond_broadcast(&changed);
}

/* Whether it can be taken by this thread now. */
static bool
is_free(bool fork)
{
    return !held && (fork || !forks_waiting);
}

static bool
take(bool fork)
{
    struct timespec until;
    int failed = 0;
    bool taken;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += LONGEST;
    forks_waiting += fork;
    while (!is_free(fork) && !failed)
        failed = pthread_cond_timedwait(&changed, &guard, &until);
    forks_waiting -= fork;
    taken = is_free(fork);
    if (taken) {
        holder = pthread_self();
        by_fork = fork;
        held = true;
    } else
        pthread_cond_broadcast(&changed); /* calls waited for this fork */
    return taken;
}

/* Take it, waiting without the GIL, which the other thread's call needs. */
static bool
take_in_turn(bool fork)
{
    bool taken;

    Py_BEGIN_ALLOW_THREADS
    pthread_mutex_lock(&guard);
    taken = take(fork);
    pthread_mutex_unlock(&guard);
    Py_END_ALLOW_THREADS
    return taken;
}

/* ---------------------------------------------------------------- forks --- */

/* Whoever else held it, or waits, is not here. */
static void
in_any_child(void)
{
    guard = (pthread_mutex_t)PTHREAD_MUTEX_INITIALIZER;
    make_condition();
    forks_waiting = 0;
    forks++;
    if (is_mine() && running) /* a handler's fork: a program begins in it */
        pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!is_mine() || by_fork)
        held = running = by_fork = false;
}

/* As the module is loaded, so once, and without pthread_once(3), which is
 * fatal where a sandbox refuses futex(2).
 */
__attribute__((constructor)) static void
prepare(void)
{
    make_condition();
    pthread_atfork(NULL, NULL, in_any_child);
}

/* ------------------------------------------------------------ functions --- */

/* Call it with this thread's signals delivered before or after. */
static PyObject *
call_deferring_signals(PyObject *action)
{
    PyObject *result = NULL;
    sigset_t block;

    sigfillset(&block);
    for (size_t i = 0; i < sizeof synchronous / sizeof *synchronous; i++)
        sigdelset(&block, synchronous[i]);
    pthread_sigmask(SIG_BLOCK, &block, &before);
    running = true; /* nobody else looks at it while this thread holds */
    /* What came until now is the caller's, and nothing is begun. */
    if (PyErr_CheckSignals() == 0)
        result = PyObject_CallNoArgs(action);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

PyDoc_STRVAR(
    alone_doc,
    "alone(action, otherwise) -> what action() returns\n\n"
    "Call action() while no other thread is in alone() and none forks.  This thread's\n"
    "signals are delivered before or after it, with nothing half-done in between.\n"
    "Where action() is under way in this very thread (a signal handler's call), the\n"
    "result is that of otherwise(True); where it is in another one and does not end\n"
    "within ten seconds, otherwise(False).");

static PyObject *
core_alone(PyObject *module, PyObject *args)
{
    PyObject *action, *otherwise, *result;
    bool mine, nested;

    (void)module;
    if (!PyArg_ParseTuple(args, "OO", &action, &otherwise))
        return NULL;
    pthread_mutex_lock(&guard);
    mine = is_mine();
    nested = mine && running;
    pthread_mutex_unlock(&guard);
    if (nested)
        return PyObject_CallFunctionObjArgs(otherwise, Py_True, NULL);
    if (!mine && !take_in_turn(false))
        return PyObject_CallFunctionObjArgs(otherwise, Py_False, NULL);
    result = call_deferring_signals(action);
    pthread_mutex_lock(&guard);
    running = false;
    if (is_mine() && !by_fork)
        let_go();
    pthread_mutex_unlock(&guard);
    return result;
}

PyDoc_STRVAR(
    before_fork_doc,
    "before_fork() -> None\n\n"
    "For os.register_at_fork(): wait for another thread's alone(), ten seconds\n"
    "at most, and keep others out until after_fork() in the parent.  A child starts\n"
    "with nobody in alone(), or this thread if that is where it forked.");

static PyObject *
core_before_fork(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    bool mine;

    (void)module;
    pthread_mutex_lock(&guard);
    mine = is_mine();
    pthread_mutex_unlock(&guard);
    if (!mine)
        take_in_turn(true);
    Py_INCREF(Py_None);
    return Py_None;
}

PyDoc_STRVAR(
    after_fork_doc,
    "after_fork() -> None\n\n"
    "For os.register_at_fork(), in the parent: the end of before_fork().");

static PyObject *
core_after_fork(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    pthread_mutex_lock(&guard);
    if (is_mine() && by_fork)
        let_go();
    pthread_mutex_unlock(&guard);
    Py_INCREF(Py_None);
    return Py_None;
}

PyDoc_STRVAR(
    forks_doc,
    "forks() -> int\n\n"
    "How many forks lie between the process that loaded this module and this one.");

static PyObject *
core_forks(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    (void)module;
    return PyLong_FromUnsignedLong(forks);
}

PyMethodDef page_primer_alone_methods[] = {
    {"alone", core_alone, METH_VARARGS, alone_doc},
    {"before_fork", core_before_fork, METH_NOARGS, before_fork_doc},
    {"after_fork", core_after_fork, METH_NOARGS, after_fork_doc},
    {"forks", core_forks, METH_NOARGS, forks_doc},
    {NULL, NULL, 0, NULL},
};
