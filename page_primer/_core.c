/* page_primer._core: the mechanism, and the only code of page-primer that
 * touches the address space.  It decides nothing: which ranges, in which
 * order, from which memory, is the caller's business (plan.py, apply/).
 *
 * Every failure of a system call is a page_primer._core.Error, an OSError
 * that carries the errno, the step that failed and the address range it was
 * working on, so that a report can say exactly what happened where.
 *
 * Here are the module itself and what is asked of the process; _core.h lists
 * the other files.
 */

#include "_core.h"

#include <errno.h>
#include <linux/capability.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

/* Numbers that the C library's headers may be too old to have. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MLOCK_ONFAULT
#define MLOCK_ONFAULT 1
#endif
#ifndef PR_GET_MDWE
#define PR_GET_MDWE 66
#endif

/* ----------------------------------------------------------- questions --- */

PyDoc_STRVAR(
    thp_disabled_doc,
    "thp_disabled() -> bool\n\n"
    "Whether PR_SET_THP_DISABLE is in force (prctl(2)).  With the flag\n"
    "PR_THP_DISABLE_EXCEPT_ADVISED (Linux 6.18) it does not concern us, who\n"
    "advise.");

static PyObject *
core_thp_disabled(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    int got = prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0);

    if (got < 0)
        return fail(module, errno, "PR_GET_THP_DISABLE", 0, 0);
    return PyBool_FromLong(got == 1);
}

PyDoc_STRVAR(
    mdwe_doc,
    "mdwe() -> int\n\n"
    "PR_GET_MDWE: the memory-deny-write-execute flags in force (Linux 6.3).");

static PyObject *
core_mdwe(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    int got = prctl(PR_GET_MDWE, 0, 0, 0, 0);

    if (got < 0)
        return fail(module, errno, "PR_GET_MDWE", 0, 0);
    return PyLong_FromLong(got);
}

PyDoc_STRVAR(
    limit_doc,
    "limit(resource) -> int or None\n\n"
    "The soft limit of getrlimit(2), None where there is none.  (The module\n"
    "resource would be one more library to load, to survey and to lock.)");

static PyObject *
core_limit(PyObject *module, PyObject *args)
{
    struct rlimit found;
    int which;

    if (!PyArg_ParseTuple(args, "i:limit", &which))
        return NULL;
    if (getrlimit(which, &found) < 0)
        return fail(module, errno, "getrlimit", 0, 0);
    if (found.rlim_cur == RLIM_INFINITY)
        return none();
    return PyLong_FromUnsignedLongLong(found.rlim_cur);
}

PyDoc_STRVAR(
    credentials_doc,
    "credentials() -> (int, int, bool, bool, bool)\n\n"
    "The effective user id of the calling thread, its permitted capabilities\n"
    "(capget(2)), whether the process is dumpable (PR_GET_DUMPABLE), whether\n"
    "it runs in secure-execution mode (AT_SECURE, getauxval(3)), and whether\n"
    "its real, effective and saved ids are of one user and one group.  By\n"
    "system calls: fakeroot(1) and its like wrap what the C library has.");

static PyObject *
core_credentials(PyObject *module, PyObject *Py_UNUSED(ignored))
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct sets[_LINUX_CAPABILITY_U32S_3] = {{0}};
    unsigned long long permitted;
    uid_t user, real_user, saved_user;
    gid_t group, real_group, saved_group;
    int dumpable, one;

    if (syscall(SYS_getresuid, &real_user, &user, &saved_user) < 0)
        return fail(module, errno, "getresuid", 0, 0);
    if (syscall(SYS_getresgid, &real_group, &group, &saved_group) < 0)
        return fail(module, errno, "getresgid", 0, 0);
    if (syscall(SYS_capget, &header, sets) < 0)
        return fail(module, errno, "capget", 0, 0);
    dumpable = prctl(PR_GET_DUMPABLE, 0, 0, 0, 0);
    if (dumpable < 0)
        return fail(module, errno, "PR_GET_DUMPABLE", 0, 0);
    permitted =
        (unsigned long long)sets[1].permitted << 32 | sets[0].permitted;
    one = real_user == user && saved_user == user && real_group == group
        && saved_group == group;
    return Py_BuildValue("(kKNNN)", (unsigned long)user, permitted,
                         PyBool_FromLong(dumpable == 1),
                         PyBool_FromLong(getauxval(AT_SECURE) != 0),
                         PyBool_FromLong(one));
}

PyDoc_STRVAR(
    filesystem_doc,
    "filesystem(fd) -> int\n\n"
    "The kind of file system that an open file is on, the f_type of fstatfs(2).");

static PyObject *
core_filesystem(PyObject *module, PyObject *args)
{
    struct statfs found;
    int fd, number = 0;

    if (!PyArg_ParseTuple(args, "i:filesystem", &fd))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    if (fstatfs(fd, &found) < 0)
        number = errno;
    Py_END_ALLOW_THREADS
    if (number)
        return fail(module, number, "fstatfs", 0, 0);
    return PyLong_FromUnsignedLong((unsigned long)found.f_type);
}

/* -------------------------------------------------------------- module --- */

static PyMethodDef core_methods[] = {
    {"thp_disabled", core_thp_disabled, METH_NOARGS, thp_disabled_doc},
    {"mdwe", core_mdwe, METH_NOARGS, mdwe_doc},
    {"limit", core_limit, METH_VARARGS, limit_doc},
    {"filesystem", core_filesystem, METH_VARARGS, filesystem_doc},
    {"credentials", core_credentials, METH_NOARGS, credentials_doc},
    {NULL, NULL, 0, NULL},
};

static int
core_exec(PyObject *module)
{
    core_state *state = PyModule_GetState(module);

    if (PyModule_AddFunctions(module, page_primer_objects_methods) < 0
        || PyModule_AddFunctions(module, page_primer_memory_methods) < 0
        || PyModule_AddFunctions(module, page_primer_descriptor_methods) < 0
        || PyModule_AddFunctions(module, page_primer_area_methods) < 0
        || PyModule_AddFunctions(module, page_primer_populate_methods) < 0
        || PyModule_AddFunctions(module, page_primer_dump_methods) < 0
        || PyModule_AddFunctions(module, page_primer_swap_methods) < 0
        || PyModule_AddFunctions(module, page_primer_heap_methods) < 0
        || PyModule_AddFunctions(module, page_primer_alone_methods) < 0
        || add_type(module, &descriptor_spec, &state->descriptor) < 0
        || add_type(module, &area_spec, &state->area) < 0)
        return -1;
    state->error =
        PyErr_NewException("page_primer._core.Error", PyExc_OSError, NULL);
    if (state->error == NULL)
        return -1;
    Py_INCREF(state->error);
    if (PyModule_AddObject(module, "Error", state->error) < 0) {
        Py_DECREF(state->error);
        return -1;
    }
    if (PyModule_AddIntMacro(module, PROT_NONE) < 0
        || PyModule_AddIntMacro(module, PROT_READ) < 0
        || PyModule_AddIntMacro(module, PROT_WRITE) < 0
        || PyModule_AddIntMacro(module, PROT_EXEC) < 0
        || PyModule_AddIntMacro(module, MAP_PRIVATE) < 0
        || PyModule_AddIntMacro(module, MAP_SHARED) < 0
        || PyModule_AddIntMacro(module, MAP_ANONYMOUS) < 0
        || PyModule_AddIntMacro(module, MAP_NORESERVE) < 0
        || PyModule_AddIntMacro(module, MAP_POPULATE) < 0
        || PyModule_AddIntMacro(module, MADV_HUGEPAGE) < 0
        || PyModule_AddIntMacro(module, MADV_COLLAPSE) < 0
        || PyModule_AddIntMacro(module, MADV_POPULATE_READ) < 0
        || PyModule_AddIntMacro(module, MADV_POPULATE_WRITE) < 0
        || PyModule_AddIntMacro(module, MLOCK_ONFAULT) < 0
        || PyModule_AddIntMacro(module, RLIMIT_MEMLOCK) < 0
        || PyModule_AddIntMacro(module, RLIMIT_FSIZE) < 0)
        return -1;
    return 0;
}

static int
core_traverse(PyObject *module, visitproc visit, void *arg)
{
    core_state *state = PyModule_GetState(module);

    if (state != NULL) {
        Py_VISIT(state->error);
        Py_VISIT(state->descriptor);
        Py_VISIT(state->area);
    }
    return 0;
}

static int
core_clear(PyObject *module)
{
    core_state *state = PyModule_GetState(module);

    if (state != NULL) {
        Py_CLEAR(state->error);
        Py_CLEAR(state->descriptor);
        Py_CLEAR(state->area);
    }
    return 0;
}

/* The module has no state but its classes.  What is the process's is
 * guarded by mutexes (_alone.c, _heap.c) or atomic (_loader.c), and all else is
 * one system call or takes the loader's lock: nothing needs the GIL, or the
 * main interpreter.  (arenas_install() is called with one: builds without it
 * have no arenas.)  What is primed is the process's, too: apply/registry.py
 * keeps that book in the interpreter that primed.
 *
 * Numbers and values of slots that the headers for the stable ABI of 3.10 do
 * not have; interpreters before these versions refuse slots they do not know,
 * so which ones count is decided when the module is loaded.
 */
#define SLOT_MULTIPLE_INTERPRETERS 3 /* 3.12 */
#define PER_INTERPRETER_GIL_SUPPORTED ((void *)2)
#define SLOT_GIL 4 /* 3.13 */
#define GIL_NOT_USED ((void *)1)

static PyModuleDef_Slot core_slots[] = {
    {Py_mod_exec, core_exec},
    {0, NULL}, /* 3.12 and newer: own GIL */
    {0, NULL}, /* 3.13 and newer: no GIL */
    {0, NULL},
};

PyDoc_STRVAR(
    core_doc,
    "Mechanism of page_primer: ELF objects, mappings, the swap, locking.\n"
    "Private: addresses are not checked.");

static struct PyModuleDef core_module = {
    PyModuleDef_HEAD_INIT,       .m_name = "page_primer._core",
    .m_doc = core_doc,           .m_size = sizeof(core_state),
    .m_methods = core_methods,   .m_slots = core_slots,
    .m_traverse = core_traverse, .m_clear = core_clear,
};

/* Whether the running interpreter is 3.`minor` or newer. */
static int
is_since(long minor)
{
    char *rest;
    long major = strtol(Py_GetVersion(), &rest, 10);

    return major > 3 || (*rest == '.' && strtol(rest + 1, NULL, 10) >= minor);
}

PyMODINIT_FUNC
PyInit__core(void)
{
    /* The same values whoever comes first: every interpreter of a process is
     * of one version. */
    if (is_since(12))
        core_slots[1] = (PyModuleDef_Slot){SLOT_MULTIPLE_INTERPRETERS,
                                           PER_INTERPRETER_GIL_SUPPORTED};
    if (is_since(13))
        core_slots[2] = (PyModuleDef_Slot){SLOT_GIL, GIL_NOT_USED};
    return PyModuleDef_Init(&core_module);
}
