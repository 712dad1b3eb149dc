"""Try a rewritten file in a child process before it replaces the original."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from page_primer.align.original import Original, Refused, read
from page_primer.elf import file as elf

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_SECONDS = 120
_PYTHON = re.compile(r"python\d*(\.\d+)*[a-z]*")
_LIBPYTHON = re.compile(r"libpython\d.*\.so.*")
_LIBRARY = re.compile(r".*\.so(\.[\w.]+)?")

# Imports what lib-dynload has, but modules for tests of CPython itself, and says whether the file
# named is what is executed.
_IMPORTS = """
import importlib, os, sys
failed = []
for place in [p for p in sys.path if p.endswith("lib-dynload")]:
    for name in sorted({f.partition(".")[0] for f in os.listdir(place) if ".so" in f}):
        if name.startswith(("_test", "_ctypes_test", "_xxtest", "xx", "_tkinter", "readline")):
            continue
        try:
            importlib.import_module(name)
        except ImportError:
            failed.append(name)
import decimal, json, re, threading
assert json.loads(json.dumps({"a": [1.5, None]})) == {"a": [1.5, None]}
assert re.findall("a+", "aab") == ["aa"] and decimal.Decimal("0.1") * 3 == decimal.Decimal("0.3")
thread = threading.Thread(target=sum, args=([1, 2],))
thread.start()
thread.join()
try:
    1 / 0
except ZeroDivisionError:
    pass
with open("/proc/self/maps", errors="surrogateescape") as maps:
    used = any(line.rstrip().endswith("/" + sys.argv[1]) for line in maps)
print("tried", used, ",".join(failed))
"""

_DLOPEN = """
import ctypes, os, sys
ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)
print("tried", True)
"""


class Answer(NamedTuple):
    """`text` is what was found, or the last line of what went wrong."""

    worked: bool
    text: str


def check(original: Original, path: str) -> None:
    """Raise Refused where there is no way to try a file but to run it."""
    if _is_another_program(original, path):
        _lister(original)


def run(original: Original, path: str, new: str, python: str | None) -> str | None:
    """Try the new file as what it is: an interpreter, its library, a library, another program.

    Args:
        original: the original's headers.
        path: the original.
        new: the rewritten file, beside it.
        python: the interpreter that libraries belong to.

    Returns:
        None, or why it could not be tried: the original fails as well.

    Raises:
        Refused: the original works, and the new file does not, or otherwise.
    """
    name = os.path.basename(path)
    attempt: Callable[[str], Answer]
    if _LIBPYTHON.fullmatch(name) and python is not None and name in _needed(python):
        attempt = lambda file: _with_library(file, name, python)  # noqa: E731
    elif original.interpreter and _PYTHON.fullmatch(name):
        attempt = lambda file: _ask(  # noqa: E731
            [file, "-I", "-S", "-c", _IMPORTS, os.path.basename(file)]
        )
    elif _is_another_program(original, path):
        attempt = _lister(original)
    elif python is None:
        return "not tried: no interpreter to load it with"
    else:
        attempt = lambda file: _ask([python, "-c", _DLOPEN, file])  # noqa: E731
    got, expected = attempt(new), attempt(path)
    if not expected.worked:
        return f"not tried: the original cannot be loaded either ({expected.text})"
    if got != expected:
        raise Refused(f"the new file failed its trial ({got.text})")
    return None


def _needed(program: str) -> list[str]:
    """DT_NEEDED of a program; empty where it cannot be read."""
    try:
        fd = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return read(fd).needed
    except (Refused, OSError):
        return []
    finally:
        os.close(fd)


def _with_library(file: str, name: str, python: str) -> Answer:
    """The interpreter with this file for its library: the loader takes what was loaded first under
    the name for what is needed."""
    # LD_PRELOAD is a list: neither a space nor a colon may be in the path.
    with tempfile.TemporaryDirectory(prefix="page-primer-") as directory:
        link = os.path.join(directory, name)
        os.symlink(file, link)
        command = [python, "-I", "-S", "-c", _IMPORTS, os.path.basename(file)]
        return _ask(command, {"LD_PRELOAD": link})


def _is_another_program(original: Original, path: str) -> bool:
    """Whether it is a program, and neither an interpreter nor loaded as a library."""
    name = os.path.basename(path)
    return original.is_program and not (_PYTHON.fullmatch(name) or _LIBRARY.fullmatch(name))


def _lister(original: Original) -> Callable[[str], Answer]:
    """How another program is tried: its loader maps it, applies its relocations, says what it has
    loaded, and does not start it. A loader that knows neither way would."""
    loader = original.interpreter
    # The variable is glibc's alone (ld.so(8)): musl runs the program. The name of the file in
    # PT_INTERP may be a link to another's, as Alpine's gcompat has it.
    if _soname(loader).startswith("ld-linux"):
        variables = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_WARN": "1", "LD_BIND_NOW": "1"}
        return lambda file: _listed([file], variables)
    if os.path.basename(loader).startswith("ld-musl-"):
        return lambda file: _listed([loader, "--list", file], {})
    raise Refused(f"it cannot be tried without being run: {loader} is not glibc's or musl's loader")


def _soname(path: str) -> str:
    """DT_SONAME; empty where there is none, or the file cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return ""
    try:
        return next(iter(elf.File(fd).dynamic_strings(elf.DT_SONAME)), "")
    except (OSError, elf.Malformed):
        return ""
    finally:
        os.close(fd)


def _listed(command: Sequence[str], variables: Mapping[str, str]) -> Answer:
    status, out, err = _output(command, variables)
    # Addresses are random.
    found = sorted(re.sub(r"\(0x[0-9a-f]+\)", "", out).split("\n"))
    return Answer(not status, "\n".join(found)) if not status else Answer(False, _last(err))


def _ask(command: Sequence[str], variables: Mapping[str, str] | None = None) -> Answer:
    status, out, err = _output(command, variables or {})
    last = _last(out)
    if status or not last.startswith("tried True"):
        text = _last(err) or last or f"status {status}"
        return Answer(False, text.replace("\n", " "))
    return Answer(True, last)


def _output(command: Sequence[str], variables: Mapping[str, str]) -> tuple[int, str, str]:
    # In the user's own environment, less what would put page-primer's work between.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PAGE_PRIMER", "LD_PRELOAD"))}
    try:
        done = subprocess.run(
            command, env={**kept, **variables}, stdin=subprocess.DEVNULL, capture_output=True,
            timeout=_SECONDS, check=False, cwd="/",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, "", f"no end after {_SECONDS} s"
    except OSError as error:
        return 1, "", str(error)
    return (
        done.returncode,
        done.stdout.decode(errors="replace"),
        done.stderr.decode(errors="replace"),
    )


def _last(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
