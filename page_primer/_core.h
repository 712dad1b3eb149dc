/* page_primer._core: what the other files of the module add to it. */

#ifndef PAGE_PRIMER_CORE_H
#define PAGE_PRIMER_CORE_H

#include <Python.h>

#pragma GCC visibility push(hidden)

/* _heap.c */
extern PyMethodDef page_primer_heap_methods[];

/* _alone.c */
extern PyMethodDef page_primer_alone_methods[];

#pragma GCC visibility pop

#endif
