"""How processes are started: the C program that brings aligned files into memory (warm.c) and its
callers."""
