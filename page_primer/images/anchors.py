"""Anchors: where a program was moved off its own file, they tell tools where it is.

A program that is linked for one address (ET_EXEC) needs no load bias, yet tools work one out, from
the first mapping that they take for the program's. That one may lie beyond the code once this is
elsewhere. A anchor is a small ELF file, one page of it mapped read-only, with the program's
dynamic symbols and a PT_LOAD at the address of that page, so that from it the bias comes out as
none. Two are known:

- `near`, the page below the program, of its file's name: pystack (elfutils), py-spy and CPython's
  remote debugging take the first mapping by that name. An image is that itself; memory without a
  name needs one.
- `far`, above it, with "libpython" in its path: austin takes the first mapping of /proc/PID/exe's
  path for the program's start, wherever it is, but after it believes a libpython.

(What tools do was read in austin 3.7, py-spy 0.4, pystack 1.7, CPython 3.14 and elfutils 0.188.)
"""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.elf import file as elf
from page_primer.elf.file import PF_R, PT_LOAD, ProgramHeader
from page_primer.elf.objects import Object
from page_primer.images import layout as image
from page_primer.images import names
from page_primer.images.copying import write_all
from page_primer.images.layout import CannotLayOut, Layout
from page_primer.images.room import NO_LIMIT
from page_primer.images.trust import Unusable
from page_primer.kernel import smaps
from page_primer.kernel.limits import check_file_size
from page_primer.kernel.smaps import overlapping
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from page_primer.images.places import Place
    from page_primer.images.store import Image

NEAR, FAR = "near", "far"
# Sections of which tools want the address alone.
_PLACES = (".bss", ".PyRuntime")


class Anchor(Layout):
    """A anchor's file."""

    address: int = 0  # where its page is mapped

    @property
    def content_end(self) -> int:
        return page_size()

    def size(self, original: int) -> int:
        return sum(len(data) for _, data in self._parts(original))

    def write(self, original: int, target: int, room: int = NO_LIMIT) -> int:  # noqa: ARG002  # Layout's
        parts = self._parts(original)
        check_file_size(max(offset + len(data) for offset, data in parts))
        return sum(write_all(target, data, offset) for offset, data in parts)

    def is_in(self, target: int) -> bool:
        """Whether a file is what write() writes."""
        flags = os.O_RDONLY | os.O_CLOEXEC
        with _core.opened(os.open, self.object.path, flags) as original:
            parts = self._parts(original)
        return all(os.pread(target, len(data), offset) == data for offset, data in parts)

    def _parts(self, original: int) -> list[tuple[int, bytes]]:
        """What the file consists of: offsets, and what is there."""
        try:
            file = elf.File(original)
            parts, table = self._sections(file)
        except elf.Malformed as error:
            raise CannotLayOut(f"not a well-formed ELF file: {error}") from error
        at = image.align(max(offset + len(data) for offset, data in parts))
        header = file.header._replace(e_phoff=elf.HEADER.size, e_shoff=at, e_phnum=1)
        page = page_size()
        load = ProgramHeader(PT_LOAD, PF_R, 0, self.address, self.address, page, page, page)
        head = header.pack() + load.pack()
        return [(0, head.ljust(page, b"\0")), *parts, (at, table)]

    def _sections(self, file: elf.File) -> tuple[list[tuple[int, bytes]], bytes]:
        """The sections' content, and their headers: the dynamic symbols, and what has an address
        that matters."""
        sections = file.sections()
        titles = file.section_names(sections)
        symbols = next((i for i, s in enumerate(sections) if s.sh_type == elf.SHT_DYNSYM), None)
        if symbols is None:
            raise CannotLayOut("no dynamic symbols")
        kept = {symbols, sections[symbols].sh_link, file.header.e_shstrndx}
        at = page_size()
        parts, table = [], []
        for index, (title, section) in enumerate(zip(titles, sections, strict=True)):
            if index in kept:
                parts.append((at, file.read(section.sh_offset, section.sh_size)))
                table.append(section._replace(sh_offset=at).pack())
                at = image.align(at + section.sh_size)
            elif title in _PLACES:
                table.append(section._replace(sh_type=elf.SHT_NOBITS, sh_offset=at).pack())
            else:
                table.append(bytes(elf.SECTION_HEADER.size))
        return parts, b"".join(table)


def lay_out(obj: Object, which: str, address: int) -> Anchor:
    """An object's anchor, NEAR or FAR, for an address."""
    assert obj.source is not None, "only objects with a file are planned"
    name = names.of(obj.source, f"{address:x}", names.ANCHOR)
    if which == FAR:
        name = names.as_libpython(name)
    return Anchor(obj, (), 0, name, address)


class Anchors:
    """The anchors of one move: put up when a replacement asks for them, taken down with it."""

    def __init__(self, obj: Object, near: int, far: int, places: Sequence[Place]) -> None:
        """
        Args:
            obj: the object.
            near, far: the addresses of its anchors; 0 for none.
            places: directories for their files, those for images.
        """
        self._object, self._places = obj, places
        self._addresses = {NEAR: near, FAR: far}
        self._mapped: dict[str, tuple[int, Image]] = {}
        self.problem: str | None = None  # why one could not be put up

    def map(self, wanted: Collection[str]) -> bool:
        """Map those that are wanted; returns whether all are there."""
        for which in wanted:
            if which not in self._mapped:
                try:
                    self._map(which)
                except ours(OSError, CannotLayOut) as error:
                    self.problem = f"no anchor: {error}"
                    return False
                self.problem = None
        return True

    def unmap(self, but: Collection[str] = ()) -> None:
        """Unmap those that are mapped, but for some."""
        for which in [which for which in self._mapped if which not in but]:
            address, file = self._mapped[which]
            folder = f"/{os.path.basename(os.path.dirname(file.path))}/"
            # The host may have mapped something of its own there since.
            with suppress(OSError):
                here = overlapping(smaps.read_maps(), address, address + 1)
                if any(mapping.start == address and folder in mapping.path for mapping in here):
                    _core.unmap(address, page_size())
            file.close()
            del self._mapped[which]

    def _map(self, which: str) -> None:
        address = self._addresses[which]
        file = self._file(lay_out(self._object, which, address))
        # First of all: what a signal handler interrupts is taken down as well.
        self._mapped[which] = address, file
        file.keep()
        try:
            _core.map(address, page_size(), _core.PROT_READ, _core.MAP_PRIVATE, file.fd, 0)
        except ours(OSError):
            file.close()
            del self._mapped[which]
            raise
        file.close_file()

    def _file(self, layout: Anchor) -> Image:
        """The file, in the first directory that takes it: it needs no huge pages."""
        why = "no directory for it"
        for place in self._places:
            try:
                with place.open() as directory:
                    found = directory.get(layout)
                    right = False
                    try:
                        right = found.written > 0 or layout.is_in(found.fd)
                    finally:
                        if not right:
                            found.close()
                    return found if right else directory.get(layout, fresh=True)
            except ours(Unusable, OSError) as error:
                why = f"{place.path}: {getattr(error, 'strerror', None) or error}"
        raise CannotLayOut(why)
