"""An interpreter of its own for a memory cgroup, and a neighbour that takes the memory away.

Pages belong to the cgroup that touched them first, and other processes keep the machine's
interpreter in memory: only files that nobody else maps can be evicted from one cgroup alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import page_primer
from harness.cgroup import Cgroup
from harness.interpreters import BASE

__all__ = ["drop", "environment", "private_copy", "stream_through"]

PACKAGES = ("gunicorn", "flask", "werkzeug", "jinja2", "markupsafe", "click", "itsdangerous",
            "blinker", "packaging", "elftools", "celery", "kombu", "vine", "billiard", "amqp",
            "redis", "dateutil", "six.py", "tzdata", "tzlocal", "exceptiongroup",
            "click_didyoumean", "click_plugins", "click_repl", "prompt_toolkit", "wcwidth",
            "typing_extensions.py")  # fmt: skip

NEIGHBOUR = """
import mmap, os, sys
path, passes = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
for _ in range(int(passes)):
    # Each part twice in a row: pages in use, so that the kernel takes them for as good as others.
    for part in range(0, size, 16 << 20):
        for _ in range(2):
            for at in range(part, min(size, part + (16 << 20)), 1 << 20):
                os.pread(fd, 1 << 20, at)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
"""


def private_copy(home: Path, modules: Mapping[str, str] | None = None) -> None:
    """Copy this interpreter, the libraries and packages it uses here, and drop them from memory;
    `modules` are more files beside the packages, by name."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    executable = os.path.realpath(BASE)
    shutil.copy(executable, home / "bin" / version)
    unwanted = ("test", "site-packages", "dist-packages", "idlelib", "tkinter", "lib2to3",
                "ensurepip", "turtledemo", "config-*", "__pycache__", "*.a")  # fmt: skip
    library = Path(sysconfig.get_path("stdlib"))
    shutil.copytree(library, home / "lib" / version, ignore=shutil.ignore_patterns(*unwanted))
    extensions = [str(p) for p in library.glob("lib-dynload/*.so")]
    listed = subprocess.run(["ldd", executable, *extensions], capture_output=True, text=True).stdout
    for path in set(re.findall(r"=> (/\S+)", listed)):
        shutil.copy(path, home / "lib")
    site = home / "site"
    site.mkdir()
    shutil.copytree(Path(page_primer.__file__).parent, site / "page_primer")
    for name in PACKAGES:
        source = Path(sysconfig.get_path("purelib")) / name
        if source.is_dir():
            shutil.copytree(source, site / name)
        elif source.exists():
            shutil.copy(source, site)
    for info in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
        shutil.copytree(info, site / info.name)
    for name, text in (modules or {}).items():
        (site / name).write_text(text)
    drop(home)


def drop(home: Path) -> None:
    """Put every file's pages out of memory: the next to touch them is charged for them."""
    os.sync()
    for path in home.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def environment(home: Path) -> dict[str, str]:
    """What makes a private copy use itself alone."""
    return {
        "PYTHONHOME": str(home), "PYTHONPATH": str(home / "site"),
        "LD_LIBRARY_PATH": str(home / "lib"),
    }  # fmt: skip


def stream_through(cgroup: Cgroup, path: Path) -> None:
    """The neighbour."""
    command = [*cgroup.wrapper, "/usr/bin/env", "-i", BASE, "-I", "-S"]
    subprocess.run([*command, "-c", NEIGHBOUR, str(path), "2"], check=True)
