"""Traces of page accesses (QEMU, pagetrace.c), replayed through TLBs (tlbsim.c)."""
