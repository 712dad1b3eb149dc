"""ELF files that are written: originals that are rewritten to be aligned on huge pages."""
