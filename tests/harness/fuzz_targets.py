"""What is fuzzed, by tools/fuzz for as long as one likes and by test_fuzz.py for seconds.

A target takes bytes and says whether they were accepted, as far as that means anything; whatever it
raises is a find. Each allows only the exceptions that its subject's callers expect.
"""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import functools
import itertools
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.elves import HEADERS_APART
from page_primer import _core, options, plan, processes, reasons, survey
from page_primer._lean import replace
from page_primer.align import aligned, files, layout, original, rewrite, verify
from page_primer.align.original import Refused
from page_primer.elf import file as elf
from page_primer.elf.file import PF_R, PF_X
from page_primer.elf.objects import Object, Region, Source, is_out_of_proportion, segments_of
from page_primer.heap import chunks
from page_primer.images import layout as image
from page_primer.kernel import memory, mounts, smaps
from page_primer.kernel.pagemap import Pagemap
from page_primer.kernel.smaps import Mapping

PAGE = 4096
PMD = 1 << 14  # huge pages of 16 KiB, so that files can be small
BASE = 0x7F0000000000
_FILE_SIZE = 1 << 16  # bytes, of what program headers are made up for
FOLDER = Path(__file__).parents[1] / "corpus"

# Linked without a C library: a few KiB, and yet a library that can be loaded and called.
_SOURCE = """
const int table[64] = {[0] = 5, [1] = 7};
static int counter = 3;
int blank[512];
int answer(int n) { blank[n] += table[n]; return table[n] + counter++ + blank[n]; }
__asm__(".text\\n.globl filling\\nfilling:\\n.fill 36000, 1, 0x90\\nret\\n");
"""
_LINKS = {
    "separate": ["-Wl,-z,separate-code"],
    "together": ["-Wl,-z,noseparate-code"],
    "large pages": ["-Wl,-z,separate-code,-z,max-page-size=16384"],
    "stripped": ["-s", "-Wl,-z,separate-code"],
    # No segment has the headers, so that all offsets change.
    "headers apart": ["-Wl,-z,separate-code", "-Wl,-T,{folder}/script"],
}


@functools.cache
def libraries() -> tuple[bytes, ...]:
    """Small sound ELF libraries; none where there is no compiler."""
    if shutil.which("gcc") is None:
        return ()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script").write_text(HEADERS_APART)
        for options_ in _LINKS.values():
            target = Path(folder, "small.so")
            options_ = [option.format(folder=folder) for option in options_]
            command = ["gcc", "-shared", "-nostdlib", "-fPIC", "-O1", *options_, "-xc", "-",
                       "-o", str(target)]  # fmt: skip
            subprocess.run(command, input=_SOURCE, text=True, check=True, capture_output=True)
            found.append(target.read_bytes())
    return tuple(found)


@functools.cache
def _scratch() -> Path:
    # In memory: on ext4 a file that is cut to nothing and written again waits for the disk.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    return Path(tempfile.mkdtemp(prefix="page-primer-fuzz-", dir=place))


def clean_up() -> None:
    """Remove what targets have written."""
    shutil.rmtree(_scratch(), ignore_errors=True)
    _scratch.cache_clear()


def _file(data: bytes, name: str = "given.so") -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


def _headers_of(data: bytes) -> list[elf.ProgramHeader]:
    return elf.ProgramHeader.parse_table(data[: len(data) // 56 * 56])


# ------------------------------------------------------------------------------------- ELF files --


def elf_file(data: bytes) -> bool:
    """Every question that elf.File answers."""
    fd = os.open(_file(data), os.O_RDONLY)
    sound = True

    def ask(question: Callable[[], Any]) -> Any:
        nonlocal sound
        try:
            return question()
        except elf.Malformed:
            sound = False
            return None

    try:
        file = ask(lambda: elf.File(fd))
        if file is None:
            return False
        headers = _headers_of(ask(file.program_headers) or b"")
        sections = ask(file.sections) or []
        names = ask(lambda: file.section_names(sections))
        assert names is None or len(names) == len(sections)
        for header in headers[:64]:
            found = ask(functools.partial(file.build_id, header))
            assert found is None or 0 <= found[0] <= found[0] + found[1] <= file.size
            elf.has_text_relocations(ask(functools.partial(file.dynamic, header)) or [])
        ask(lambda: file.dynamic_strings(elf.DT_NEEDED))
        for one in headers[:64]:
            aligned.is_aligned(one.pack(), PMD)
    finally:
        os.close(fd)
    return sound


def program_headers(data: bytes) -> bool:
    """Segments of a program header table, a plan for them, and what an image of them consists of,
    however far apart they are."""
    segments = segments_of(data[: len(data) // 56 * 56], BASE, PAGE)
    aligned.aligned_span(data[: len(data) // 56 * 56], PMD)
    if not segments:
        return False
    for low, high in itertools.pairwise(segments):
        assert low.start <= high.start and low.end <= high.start, "segments overlap"
    source = Source("/lib/x.so", 1, 2, _FILE_SIZE, 4, 5)
    obj = Object("x", "/lib/x.so", BASE, data, segments, interpreter=True, source=source)
    if is_out_of_proportion(obj.span_bytes, source.size):  # as the survey has it
        obj = replace(obj, problem=reasons.OUT_OF_PROPORTION)
    for merge in (True, False):
        found = survey.Survey((obj,), PMD, False, 1, (1, 0))
        planned = plan.make(found, options.Options(merge=merge))
        assert not (obj.problem and planned.moves), "an object with a problem is moved"
        for move in planned.moves:
            for regions in (move.image, move.memory, move.signed):
                check_regions(obj, regions)
            check_content(image.lay_out(obj, move.image, PMD))
    return bool(planned.moves)


def check_content(laid_out: image.Layout) -> None:
    """What an image consists of is all that segments have of the file, in blocks of which none is
    there twice; or it is refused, as too large."""
    try:
        laid_out.check_extent()
    except image.CannotLayOut:
        # Of what is read-only it would be as many blocks as these have, and no more.
        laid_out = replace(laid_out, object=_without_data(laid_out.object))
    last, size = 0, 0
    for offset, parts in image.content(laid_out):
        end = offset + sum(length for _, length in parts)
        assert offset // PMD == (end - 1) // PMD, "more than a block"
        assert last <= offset // PMD, "a block is there twice"
        last = offset // PMD + 1
        size += sum(length for at, length in parts if at is not None)
    assert size == sum(s.file_end - s.start for s in laid_out.object.segments)


def _without_data(obj: Object) -> Object:
    return replace(obj, segments=tuple(s for s in obj.segments if not s.writable))


def check_regions(obj: Object, regions: tuple[Region, ...]) -> None:
    """Regions lie in the object's read-only segments, apart from each other, and are never
    writable."""
    for low, high in itertools.pairwise(regions):
        assert low.end <= high.start, "regions overlap"
    for region in regions:
        assert region.start < region.end
        assert region.flags in (PF_R, PF_R | PF_X)
        inside = [s for s in obj.segments if s.start < region.end and region.start < s.end]
        inside = [s for s in inside if s.start < s.end]  # another's page may hide one
        assert not any(s.writable for s in inside), "writable memory is moved"
        assert all(s.accessible for s in inside), "what cannot be read becomes readable"
        covered = sum(min(s.end, region.end) - max(s.start, region.start) for s in inside)
        assert covered == region.end - region.start, "beyond the object"


def write_image(data: bytes) -> bool:
    """An image of a file, of which the loader mapped what a sound one has: the file may have
    changed since, its mappings not."""
    sound = next((one for one in libraries() if len(one) <= len(data) + PAGE), None)
    if sound is None:
        return False
    path = _file(data)
    table, count = struct.unpack_from("=Q", sound, 32)[0], struct.unpack_from("=H", sound, 56)[0]
    headers = sound[table : table + 56 * count]
    segments = segments_of(headers, BASE, PAGE)
    obj = Object("given.so", str(path), BASE, headers, segments,
                 source=Source.of(str(path), os.stat(path)))  # fmt: skip
    span = next(one for one in obj.spans() if any(s.code for s in one))
    laid_out = image.lay_out(obj, [Region(span[0].start, span[-1].end, PF_R | PF_X)], PMD)
    target = _scratch() / "image"
    with open(path, "rb") as source, open(target, "wb") as opened:
        try:
            written = laid_out.write(source.fileno(), opened.fileno())
        except image.CannotLayOut:
            return False
        except OSError as error:  # a page beyond the file's end
            if error.errno == errno.EFAULT:
                return False
            raise
    assert written < 4 * len(data) + (1 << 20)
    return True


# ----------------------------------------------------------------------------------------- align --


def align(data: bytes) -> bool:
    """A rewritten file brings the same bytes to the same addresses, loads and computes as its
    original does, and gives it back."""
    path = _file(data)
    target = _scratch() / "aligned.so"
    with open(path, "rb") as opened, open(target, "w+b") as new:
        try:
            found = original.read(opened.fileno())
            span = layout.best_span(found, PMD)
            if span is None:
                return False
            rewrite.write(found, layout.lay_out(found, span, PMD), new.fileno(), PMD)
            verify.check(opened, new, PMD)
        except Refused:
            return False
        new.seek(0)
        record = rewrite.read_record(new.fileno())
        assert record is not None
        rewrite.restore(new.fileno(), record)
    assert target.stat().st_size < 8 * len(data) + (65 << 20)
    assert_same_in_memory(data, target.read_bytes())
    if _only_headers_differ(data):
        before = _load(path)
        assert before is None or _load(target) == before
    return True


def assert_same_in_memory(old: bytes, new: bytes) -> None:
    """Every byte that a PT_LOAD brings to an address comes there, but for the ELF headers, and is
    followed by zeroes."""
    table, count = struct.unpack_from("=Q", old, 32)[0], struct.unpack_from("=H", old, 56)[0]
    headers = [(0, 64), (table, table + 56 * count)]
    loads = [load for load in _table_of(new) if load[0] == elf.PT_LOAD]
    for kind, _, offset, vaddr, _, filesz, memsz, _ in _table_of(old):
        if kind != elf.PT_LOAD:
            continue
        _, _, to, start, _, size, _, _ = next(
            load for load in loads if load[3] <= vaddr and vaddr + memsz <= load[3] + load[6]
        )
        place = to + vaddr - start
        assert vaddr + filesz <= start + size
        before, after = bytearray(old[offset : offset + filesz]), bytearray(new[place:][:filesz])
        for low, high in headers:
            low, high = max(low - offset, 0), max(min(high - offset, filesz), 0)
            if low < high:
                before[low:high] = after[low:high] = bytes(high - low)
        assert before == after, f"another content at {vaddr:#x}"
        rest = min(vaddr + memsz, start + size) - vaddr - filesz
        assert rest <= 0 or not new[place + filesz :][:rest].strip(b"\0")


def _table_of(data: bytes) -> Sequence[tuple[int, ...]]:
    at, count = struct.unpack_from("=Q", data, 32)[0], struct.unpack_from("=H", data, 56)[0]
    return _headers_of(data[at : at + 56 * count])


def record(data: bytes) -> bool:
    """An aligned file's record, whatever it says: the original, or nothing."""
    path = _file(data)
    with open(path, "rb") as opened:
        found = rewrite.read_record(opened.fileno())
        if found is None:
            return False
        try:
            rewrite.original_programs(opened.fileno(), found)
            rewrite.restore(opened.fileno(), found)
        except Refused:
            return False
    return True


@functools.cache
def aligned_libraries() -> tuple[bytes, ...]:
    """Small libraries after align()."""
    found = []
    for data in libraries():
        path, target = _file(data), _scratch() / "aligned.so"
        with open(path, "rb") as opened, open(target, "w+b") as new:
            read = original.read(opened.fileno())
            span = layout.best_span(read, PMD)
            assert span is not None
            rewrite.write(read, layout.lay_out(read, span, PMD), new.fileno(), PMD)
        found.append(target.read_bytes())
    return tuple(found)


def _only_headers_differ(data: bytes) -> bool:
    """Whether a file is one of libraries() but for its ELF and program headers: only such a one is
    loaded, since a loader executes what others say."""
    return any(
        len(one) == len(data) and one[end:] == data[end:]
        for one in libraries()
        if (end := 64 + 56 * struct.unpack_from("=H", one, 56)[0])
    )


def _load(path: Path) -> bytes | None:
    """What a library computes, in a child; None where it cannot be loaded."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            faulthandler.disable()  # a library that is broken may crash, as its original does
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, 5)  # not by the clock: a machine may be busy
            signal.alarm(300)  # but what waits for ever takes no processor time
            answer = ctypes.CDLL(str(path)).answer
            os.write(writer, bytes(answer(n % 2) & 0xFF for n in range(8)))
        finally:
            os._exit(0)
    os.close(writer)
    answer = os.read(reader, 64)
    os.close(reader)
    os.waitpid(child, 0)
    return answer or None


# ----------------------------------------------------------------------------- the kernel's text --


def maps(data: bytes) -> bool:
    """smaps or maps, in whatever form a kernel or a sandbox writes it: parsed, or a ValueError that
    prime() tells."""
    path, known, essences = str(_file(data, "maps")), {}, {}
    try:
        found = []
        for line, details in smaps._blocks(path):
            found.append(smaps._mapping(line, known, details.decode("ascii", "replace")))
            found.append(smaps._mapping(line, known, smaps._essence(details, essences)))
        found += [smaps._mapping(line, known) for line in data.split(b"\n")[:-1]]
        for mapping in found:
            _ = mapping.huge, mapping.is_locked, mapping.flags, mapping.count("Rss")
            list(chunks.within(mapping, PMD))
    except (ValueError, IndexError):
        return False
    list(smaps.overlapping(sorted(found, key=lambda m: m.end), 0, 1 << 40))
    return True


def mountinfo(data: bytes) -> bool:
    """mountinfo: whatever it says, the mount of a path can be asked for."""
    text = os.fsdecode(data)
    found = list(mounts.parse(text))
    mounts.mount_of("/var/tmp/page-primer", found)
    list(memory._directories("/a/b", "cgroup2", text))
    return bool(found)


def cgroup(data: bytes) -> bool:
    """The files of cgroups and meminfo, cut out of the input; memory.read() never raises."""
    parts = dict(zip(("mountinfo", "cgroup", "meminfo", "limit", "stat"), data.split(b"\xff\xff"),
                     strict=False))  # fmt: skip

    def text(path: str) -> str:
        name = os.path.basename(path)
        kind = "stat" if name == "memory.stat" else name if name in parts else "limit"
        return os.fsdecode(parts.get(kind, b""))

    before, memory._text = memory._text, text
    try:
        found = memory.read()
    finally:
        memory._text = before
    assert found is None or found.available >= 0
    return found is not None


def pagemap(data: bytes) -> bool:
    """pagemap's entries, and fewer of them than were asked for."""
    pages = Pagemap()
    pages._page = PAGE
    reader, writer = os.pipe()
    os.close(writer)
    os.close(reader)
    path = _file(data, "pagemap")
    with _core.opened(os.open, path, os.O_RDONLY) as pages._file:
        for chunk in pages.chunks(0, 4 * PMD, PMD):
            assert 0 <= chunk.exclusive <= chunk.present <= PMD // PAGE
            assert 0 <= chunk.swapped <= PMD // PAGE
    return True


def examined(data: bytes) -> bool:
    """A process that is looked at from outside may have mapped files that say anything."""
    path = _file(data)
    here = [Mapping(BASE + n * 4 * PAGE, BASE + (n * 4 + 3) * PAGE, kind, n * 3 * PAGE, "fe:00",
                    path.stat().st_ino or 1, str(path))
            for n, kind in enumerate(("r--p", "r-xp", "r--p", "rw-p"))]  # fmt: skip
    return bool(list(processes._objects(os.getpid(), here)))


# --------------------------------------------------------------------------------------- options --


def given_options(data: bytes) -> bool:
    """Variables and keyword arguments: options, or a ValueError or TypeError that names one."""
    text = data.decode("utf-8", "surrogateescape").replace("\0", "")
    environment, values = {}, {}
    for index, row in enumerate(text.split("\n")):
        name, _, value = row.partition("=")
        environment[name] = value
        if index % 2 and name.lower() in options.BY_NAME:
            values[name.lower()] = value
    for keywords in ({}, values):
        try:
            found = options.Options.load(keywords, environment)
        except (ValueError, TypeError) as error:
            text = str(error).lower()
            if "page_primer" in text or any(name in text for name in options.NAMES):
                return False
            raise
        assert 0 < found.memory_share <= 1 and found.limit >= 0 and found.heap_min_memory >= 0
        assert found.image_dir is None or found.image_dir.startswith("/")
    options.unknown_variables(environment)
    for name in list(environment)[:2]:
        options.nearest_variable(name)
    return True


# ----------------------------------------------------------------------------------- the targets --


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes], bool]
    seeds: Callable[[], tuple[bytes, ...]]
    largest: int = 1 << 16  # bytes

    @property
    def name(self) -> str:
        return self.run.__name__

    def corpus(self) -> list[bytes]:
        """What is kept of earlier runs, and what is made here."""
        kept = sorted((FOLDER / self.name).glob("*")) if (FOLDER / self.name).is_dir() else []
        return [path.read_bytes() for path in kept] + list(self.seeds())


def _tables() -> tuple[bytes, ...]:
    found = []
    for data in libraries():
        at, count = struct.unpack_from("=Q", data, 32)[0], struct.unpack_from("=H", data, 56)[0]
        found.append(data[at : at + 56 * count])
    return tuple(found)


def _read(*names: str) -> tuple[bytes, ...]:
    return tuple(Path(name).read_bytes()[: 1 << 14] for name in names)


def _cgroups() -> tuple[bytes, ...]:
    limits = (b"268435456\n", b"max\n")
    return tuple(
        b"\xff\xff".join([*_read("/proc/self/mountinfo", "/proc/self/cgroup", "/proc/meminfo"),
                          limit, b"inactive_file 4096\nactive_file 8192\n"])
        for limit in limits
    )  # fmt: skip


def _variables() -> tuple[bytes, ...]:
    values = {"limit": "64M", "memory_share": "0.5", "mlock": "code", "heap": "arenas",
              "image_dir": "/var/tmp/x", "include": "libpython*,*/numpy/*"}  # fmt: skip
    rows = [f"{option.variable}={values.get(option.name, '1')}" for option in options.TABLE]
    rows += [f"{name}={value}" for name, value in values.items()]
    return ("\n".join(rows).encode(), b"PAGE_PRIMER=0", b"limit=1G\nlimit=3\nPAGE_PRIMER_LIMT=1")


TARGETS = {
    target.name: target
    for target in (
        Target(elf_file, libraries),
        Target(program_headers, _tables, 1 << 12),
        Target(write_image, libraries),
        Target(align, libraries),
        Target(record, aligned_libraries, 1 << 17),
        Target(maps, lambda: _read("/proc/self/smaps", "/proc/self/maps"), 1 << 14),
        Target(mountinfo, lambda: _read("/proc/self/mountinfo"), 1 << 14),
        Target(cgroup, _cgroups, 1 << 14),
        Target(pagemap, lambda: (bytes(256), b"\x81" * 128), 1 << 9),
        Target(examined, libraries),
        Target(given_options, _variables, 1 << 11),
    )
}
assert files.pmd_size()  # the module is what align() is made of
