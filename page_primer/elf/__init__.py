"""ELF files and the objects loaded from them."""
