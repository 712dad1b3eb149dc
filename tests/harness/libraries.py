"""Shared libraries that are built for a test."""

import subprocess

__all__ = ["BIG", "build", "build_library"]


def build(tmp_path, name, source, *flags):
    path = tmp_path / name
    (tmp_path / "source.c").write_text(source)
    command = ["gcc", "-O1", "-o", str(path), str(tmp_path / "source.c"), *flags]
    subprocess.run(command, check=True)
    return path


# Five mebibytes of code, spread over whole huge pages at any load address, and a function in it.
BIG = """
__asm__(".text\\n.rept 0x500000\\nnop\\n.endr\\n");
int answer(void) { return 42; }
"""


def build_library(tmp_path, name, *flags):
    return build(tmp_path, name, BIG, "-shared", "-fPIC", *flags)
