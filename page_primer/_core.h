/* page_primer._core: what the other files of the module add to it. */

#ifndef PAGE_PRIMER_CORE_H
#define PAGE_PRIMER_CORE_H

#include <Python.h>

#pragma GCC visibility push(hidden)

/* _heap.c */
extern PyMethodDef page_primer_heap_methods[];

/* _alone.c; to be called before any of its functions */
extern PyMethodDef page_primer_alone_methods[];
void page_primer_alone_prepare(void);

#pragma GCC visibility pop

#endif
