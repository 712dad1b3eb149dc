"""`page-primer align`: ELF files whose read-only span the loader places on huge page boundaries."""
