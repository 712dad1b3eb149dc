"""Debian's own Python, and interpreters of other kinds that are built from its parts.

Debian's program is static. A position-independent one is built from the archive in
libpython3.X-dev, one with a shared libpython against the library of libpython3.X. Their paths have
the version in them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ARCHIVE", "DEBIAN", "LIBRARY", "PACKAGE", "build_pie", "build_shared"]

DEBIAN = os.path.realpath("/usr/bin/python3")
_NAME = os.path.basename(DEBIAN)  # python3.11 in Debian 12, python3.13 in Debian 13
PACKAGE = f"lib{_NAME}-dev"
ARCHIVE = Path(
    f"/usr/lib/{_NAME}/{_NAME.replace('python', 'config-')}-{os.uname().machine}-linux-gnu"
    f"/lib{_NAME}-pic.a"
)
# For the linker; libpython3.X-dev brings it too.
LIBRARY = Path(f"/usr/lib/{os.uname().machine}-linux-gnu/lib{_NAME}.so")


def build_shared(path: Path, options: Sequence[str] = ()) -> None:
    """Build an interpreter whose code is in Debian's libpython.

    Args:
        path: what is built.
        options: more for the linker.
    """
    _build(path, f"-l{_NAME}", *options)


def build_pie(path: Path, options: Sequence[str] = ()) -> None:
    """Build a position-independent static interpreter.

    Args:
        path: what is built; in a virtual environment of Debian's interpreter it takes the place of
            bin/python.
        options: more for the linker.
    """
    _build(path, "-pie", "-fPIE", "-Wl,--whole-archive", str(ARCHIVE), "-Wl,--no-whole-archive",
           "-Wl,--export-dynamic", "-lexpat", "-lz", "-lm", "-Wl,--unresolved-symbols=ignore-all",
           *options)  # fmt: skip


# Debian's archive of 3.13 has the module _sha2 without the functions that it calls. Where there is
# none, random and hashlib take OpenSSL's.
_MAIN = """
#include <Python.h>
#include <string.h>
int main(int argc, char **argv)
{
    for (struct _inittab *module = PyImport_Inittab; module->name != NULL; module++)
        if (strcmp(module->name, "_sha2") == 0)
            module->name = "_sha2_incomplete";
    return Py_BytesMain(argc, argv);
}
"""


def _build(path: Path, *options: str) -> None:
    path.unlink(missing_ok=True)
    source = path.with_name("main.c")
    source.write_text(_MAIN)
    command = ["gcc", "-O1", "-o", str(path), str(source), f"-I/usr/include/{_NAME}", *options]
    subprocess.run(command, check=True)
