"""Carry a plan out in this process, keep track of it, and undo it."""
