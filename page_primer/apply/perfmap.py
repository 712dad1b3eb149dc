"""A perf map: the symbols of code in memory without a file's name, for perf and tools like it.

perf looks in /tmp/perf-PID.map for the functions of anonymous executable memory, as just-in-time
compilers write it: lines of start, size and name, numbers in hexadecimal
(tools/perf/Documentation/jit-interface.txt). The symbols are those of the object's own file. A
memfd has a name, so perf does not look there for it; other tools may.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Iterable, Iterator

from page_primer import _core
from page_primer._lean import NamedTuple, ours
from page_primer.apply.swap import Key, Primed
from page_primer.backing.pieces import reason_of
from page_primer.elf import file as elf
from page_primer.elf.objects import Object, Region
from page_primer.kernel.limits import check_file_size

_STT_FUNC, _STT_GNU_IFUNC = 2, 10
_SYMBOL = struct.Struct("=IBBHQQ")


class _Symbol(NamedTuple):
    """Elf64_Sym."""

    st_name: int
    st_info: int
    st_other: int
    st_shndx: int
    st_value: int
    st_size: int


class PerfMap:
    """The perf map of this process."""

    def __init__(self) -> None:
        self._symbols: dict[Key, str] = {}
        self._written: tuple[int, frozenset[Key]] = (0, frozenset())  # the process, what is there
        self.outcome: str | None = None  # the file's path, or why there is none

    def update(self, primed: dict[Key, Primed]) -> None:
        """Write what is not in the file yet: every process has one of its own."""
        pid, before = self._written
        before = before if pid == os.getpid() else frozenset()
        nameless = {key for key, one in primed.items() if one.prepared.backing != "image"}
        new = nameless - before
        if not new:
            return
        try:
            for key in new - self._symbols.keys():
                self._symbols[key] = "".join(_lines(primed[key].object, primed[key].regions))
            text = "".join(self._symbols[key] for key in new)
            self.outcome = _write(text, again=bool(before))
        except ours(OSError) as error:
            self.outcome = f"not written: {reason_of(error)}"
        except elf.Malformed as error:
            self.outcome = f"not written: {error}"
        else:
            self._written = os.getpid(), before | new


def _lines(obj: Object, regions: Iterable[Region]) -> Iterator[str]:
    """The lines for the functions of an object that lie in `regions`."""
    ranges = [(region.start, region.end) for region in regions]
    found: dict[tuple[int, int], bytes] = {}
    with open(obj.path, "rb") as opened:
        file = elf.File(opened.fileno())
        sections = file.sections()
        for wanted in (elf.SHT_DYNSYM, elf.SHT_SYMTAB):
            for table in sections:
                if table.sh_type != wanted or table.sh_link >= len(sections):
                    continue
                names = sections[table.sh_link]
                strings = file.read(names.sh_offset, names.sh_size)
                whole = table.sh_size // _SYMBOL.size * _SYMBOL.size
                for fields in _SYMBOL.iter_unpack(file.read(table.sh_offset, whole)):
                    symbol = _Symbol._make(fields)
                    is_code = symbol.st_info & 15 in (_STT_FUNC, _STT_GNU_IFUNC)
                    if is_code and symbol.st_shndx and symbol.st_size:
                        end = strings.find(b"\0", symbol.st_name)
                        found[symbol.st_value, symbol.st_size] = strings[symbol.st_name : end]
    for (value, length), text in sorted(found.items()):
        start = obj.base + value
        if any(low <= start < high for low, high in ranges):
            yield f"{start:x} {length:x} {text.decode(errors='replace')}\n"


def _write(text: str, again: bool) -> str:
    """Write this process's perf map; returns its path.

    A file that CPython's own perf trampolines write, or that we wrote (`again`), is appended to;
    one of an earlier process of ours with this number is replaced.

    Raises:
        OSError: it cannot be written, or there is a file that is not ours alone.
    """
    path = f"/tmp/perf-{os.getpid()}.map"
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    tracing = getattr(sys, "is_stack_trampoline_active", lambda: False)()
    data = text.encode()
    check_file_size(len(data))
    try:
        fd = _core.opened(os.open, path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    except ours(FileExistsError):
        status = os.lstat(path)
        mine = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        if not (mine and stat.S_ISREG(status.st_mode) and status.st_nlink == 1):
            raise
        if not tracing and not again:
            os.unlink(path)
            flags |= os.O_CREAT | os.O_EXCL
        fd = _core.opened(os.open, path, flags, 0o600)
    with fd:
        status = os.fstat(fd)
        check_file_size(status.st_size + len(data))
        # /tmp is everybody's: what is written to is looked at again.
        if status.st_uid != os.geteuid() or not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        while data:
            data = data[os.write(fd, data) :]
    return path
