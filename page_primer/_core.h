/* page_primer._core: what its files share.  Each includes this before anything
 * else. */

#ifndef PAGE_PRIMER_CORE_H
#define PAGE_PRIMER_CORE_H

#define _GNU_SOURCE
#include <pyconfig.h> /* says whether this is a free-threaded build */
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <stdint.h>

typedef struct {
    PyObject *error;             /* page_primer._core.Error */
    PyObject *descriptor, *area; /* types */
} core_state;

#pragma GCC visibility push(hidden)

/* _support.c: errors, arguments and types. */
PyObject *none(void);
int add_type(PyObject *module, PyType_Spec *spec, PyObject **type);
void free_object(PyObject *self);
PyObject *fail(PyObject *module, int number, const char *step,
               uintptr_t start, uintptr_t end);
int to_uint64(PyObject *value, void *result);
int check_range(uint64_t address, uint64_t length);
int parse_range(PyObject *args, const char *format, uint64_t *address,
                uint64_t *length);

/* _objects.c: what the loader has mapped. */
extern PyMethodDef page_primer_objects_methods[];

/* _memory.c: memory, a function a system call. */
extern PyMethodDef page_primer_memory_methods[];

/* _populate.c: pages faulted in for reading. */
extern PyMethodDef page_primer_populate_methods[];
int populate(void *address, size_t length);

/* _descriptor.c: descriptors that somebody owns. */
extern PyMethodDef page_primer_descriptor_methods[];
extern PyType_Spec descriptor_spec;

/* _area.c: address space that somebody owns. */
extern PyMethodDef page_primer_area_methods[];
extern PyType_Spec area_spec;
void area_moved(PyObject *module, PyObject *source, uint64_t length);

/* _dump.c: what core files hold of a mapping. */
extern PyMethodDef page_primer_dump_methods[];

/* _swap.c */
extern PyMethodDef page_primer_swap_methods[];

/* _heap.c: the arena allocator. */
extern PyMethodDef page_primer_heap_methods[];

/* _alone.c: one call at a time. */
extern PyMethodDef page_primer_alone_methods[];

/* _loader.c: around whatever takes the loader's lock, without the GIL. */
void enter_loader(void);
void leave_loader(void);

#pragma GCC visibility pop

#endif
