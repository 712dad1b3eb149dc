/* page_primer._core: the functions of _heap.c, which are in the same module. */

#ifndef PAGE_PRIMER_HEAP_H
#define PAGE_PRIMER_HEAP_H

#include <Python.h>

__attribute__((visibility("hidden")))
extern PyMethodDef page_primer_heap_methods[];

#endif
