"""Debian's own Python, and a position-independent static interpreter that is built from it.

Debian ships its Python as an archive of position-independent code too, in libpython3.X-dev; its
paths have the version in them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["ARCHIVE", "DEBIAN", "PACKAGE", "build_pie"]

DEBIAN = os.path.realpath("/usr/bin/python3")
_NAME = os.path.basename(DEBIAN)  # python3.11 in Debian 12, python3.13 in Debian 13
PACKAGE = f"lib{_NAME}-dev"
ARCHIVE = Path(
    f"/usr/lib/{_NAME}/{_NAME.replace('python', 'config-')}-{os.uname().machine}-linux-gnu"
    f"/lib{_NAME}-pic.a"
)


def build_pie(path: Path, options: Sequence[str] = ()) -> None:
    """Build the interpreter.

    Args:
        path: what is built; in a virtual environment of Debian's interpreter it takes the place of
            bin/python.
        options: more for the linker.
    """
    path.unlink(missing_ok=True)
    # Debian's archive of 3.13 has the module _sha2 without the functions that it calls; hashlib has
    # its own from OpenSSL, and nothing calls these.
    source = path.with_name("main.c")
    source.write_text(
        "#include <Python.h>\nint main(int c, char **v) { return Py_BytesMain(c, v); }"
    )
    command = ["gcc", "-O1", "-o", str(path), str(source), "-pie", "-fPIE",
               f"-I/usr/include/{_NAME}", "-Wl,--whole-archive", str(ARCHIVE),
               "-Wl,--no-whole-archive", "-Wl,--export-dynamic", "-lexpat", "-lz", "-lm",
               "-Wl,--unresolved-symbols=ignore-all", *options]  # fmt: skip
    subprocess.run(command, check=True)
