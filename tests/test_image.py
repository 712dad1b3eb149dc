"""Images: ELF files that say of themselves what is true of the process that maps them."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from harness.libraries import build_library, chunks_library
from harness.outside import PMD
from harness.placement import has_one_address, require_images, require_one_address
from harness.process import Process, interpreter

from page_primer import reasons


@pytest.fixture(scope="module")
def primed(tmp_path_factory):
    """(object's path, image's path, base, mappings) of the interpreter and of libcrypto."""
    require_images()
    directory = tmp_path_factory.mktemp("images")
    with Process(sys.executable) as process:
        process.run("import ssl")
        report = process.prime(image_dir=str(directory))
        found = [
            (obj["path"], obj["where"], obj["segments"][0]["start"])
            for obj in report["objects"]
            if obj["where"]
        ]
        maps = open(f"/proc/{process.pid}/maps").read()
        memory = open(f"/proc/{process.pid}/mem", "rb", buffering=0)
        yield found, maps, memory
        memory.close()


def loads(path):
    with open(path, "rb") as file:
        return [dict(s.header) for s in ELFFile(file).iter_segments("PT_LOAD")]


def build_id(path):
    done = subprocess.run(["readelf", "-nW", path], capture_output=True, text=True)
    return [line.split()[-1] for line in done.stdout.splitlines() if "Build ID" in line]


def test_a_well_formed_file(primed):
    for _, image, _ in primed[0]:
        done = subprocess.run(["readelf", "-aW", image], capture_output=True, text=True)
        assert done.returncode == 0
        assert "Error" not in done.stderr
        assert "Warning" not in done.stderr, done.stderr
        mode = os.stat(image).st_mode & 0o777  # as far as others may read the original
        assert mode in (0o555, 0o544, 0o500)


def test_content_is_the_originals_at_its_addresses(primed):
    for path, image, _ in primed[0]:
        with open(path, "rb") as one, open(image, "rb") as two:
            table = loads(image)
            for load in loads(path):
                one.seek(load["p_offset"])
                content = one.read(load["p_filesz"])
                home = next(
                    t for t in table
                    if t["p_vaddr"] <= load["p_vaddr"] < t["p_vaddr"] + t["p_memsz"]
                )  # fmt: skip
                shift = home["p_offset"] - home["p_vaddr"]
                first, last = load["p_vaddr"], load["p_vaddr"] + len(content)
                # Of a library only what is mapped from it, which is executable.
                parts = [(first, last)] if "libcrypto" not in path else [
                    (max(first, t["p_vaddr"]), min(last, t["p_vaddr"] + t["p_memsz"]))
                    for t in table
                    if t["p_flags"] & 1
                ]  # fmt: skip
                for low, high in parts:
                    two.seek(shift + low)
                    size = max(0, high - low)
                    assert two.read(size) == content[low - first :][:size]


def test_tools_find_in_a_part_of_a_library_what_they_read_in_the_whole(primed):
    """Symbols and unwind tables, by section; the rest of the file is a hole."""
    path, image, _ = next((one for one in primed[0] if "libcrypto" in one[0]), (None,) * 3)
    if image is None:
        assert "libcrypto" not in primed[1] or not has_one_address(sys.executable), primed[1]
        pytest.skip("no libcrypto, or at its random load address no huge page of it is hot")
    with open(path, "rb") as one, open(image, "rb") as two:
        whole, part = ELFFile(one), ELFFile(two)
        for name in (".dynsym", ".dynstr", ".eh_frame", ".eh_frame_hdr"):
            assert part.get_section_by_name(name).data() == whole.get_section_by_name(name).data()
        table = part.get_section_by_name(".dynsym")
        assert any(symbol.name == "EVP_DigestInit_ex" for symbol in table.iter_symbols())
    assert os.stat(image).st_blocks * 512 < os.stat(image).st_size


def test_program_headers_are_the_mappings(primed):
    """py-spy: bias = start of the executable mapping - p_vaddr of the executable PT_LOAD."""
    for _, image, base in primed[0]:
        first = None
        for line in primed[1].splitlines():
            if line.endswith(image) and "r-xp" in line:
                start, end = (int(part, 16) for part in line.split()[0].split("-"))
                first = first or (start, end, int(line.split()[2], 16))
        executable = next(load for load in loads(image) if load["p_flags"] & 1)
        address = base if base > 0x400000 else 0
        assert first == (
            address + executable["p_vaddr"],
            address + executable["p_vaddr"] + executable["p_memsz"],
            executable["p_offset"],
        )


def test_memory_is_what_the_file_says(primed):
    memory = primed[2]
    for line in primed[1].splitlines():
        fields = line.split()
        if len(fields) > 5 and fields[5] in [image for _, image, _ in primed[0]]:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            memory.seek(start)
            with open(fields[5], "rb") as file:
                file.seek(int(fields[2], 16))
                assert memory.read(end - start) == file.read(end - start)


def test_symbols_are_the_originals(primed):
    def symbols(path):
        done = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True)
        table = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True)
        return done.stdout, table.stdout

    for path, image, _ in primed[0]:
        assert symbols(image) == symbols(path)
        assert symbols(path)[0]


@pytest.mark.images
def test_symbols_have_their_versions_where_the_rest_is_a_hole(python, images, tmp_path):
    """What is before the first chunk that moved, as of any library at a random address."""
    (tmp_path / "versions").write_text("CHUNKS_1 { global: touch; where; local: *; };")
    library = chunks_library(tmp_path, f"-Wl,--version-script={tmp_path}/versions")
    with Process(python) as process:
        process.run(
            f"import ctypes; lib = ctypes.CDLL({str(library)!r}); lib.touch(4, {PMD}); result = 0"
        )
        report = process.prime(image_dir=str(images), backing="image")
        (obj,) = [obj for obj in report["objects"] if obj["path"] == str(library)]
    listed = [
        subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True).stdout
        for path in (library, obj["where"])
    ]
    assert "touch@@CHUNKS_1" in listed[0]
    assert listed[0] == listed[1]
    done = subprocess.run(["readelf", "-aW", obj["where"]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_build_id_is_its_own(primed):
    for path, image, _ in primed[0]:
        assert len(build_id(image)) == 1
        assert build_id(image) != build_id(path)
        # Within the first page, where the kernel looks (perf record --buildid-mmap).
        assert bytes.fromhex(build_id(image)[0]) in open(image, "rb").read(4096)
    assert len({build_id(image)[0] for _, image, _ in primed[0]}) == len(primed[0])


@pytest.mark.images
def test_the_same_image_is_written_the_same(python, tmp_path):
    require_one_address(python)
    files = []
    for name in ("one", "two"):
        with Process(python) as process:
            core = interpreter(process.prime(image_dir=str(tmp_path / name)))
            files.append(open(core["where"], "rb").read())
    assert files[0] == files[1]


TRACING = Path("/sys/kernel/tracing")
TRACEFS = os.access(TRACING / "uprobe_events", os.W_OK)


@contextlib.contextmanager
def uprobe(path, symbol):
    """Have the kernel write a breakpoint into every private mapping of a function of this file."""
    with open(path, "rb") as file:
        elf = ELFFile(file)
        (found,) = elf.get_section_by_name(".dynsym").get_symbol_by_name(symbol)
        (offset,) = elf.address_offsets(found["st_value"])
    group = f"page_primer_{os.getpid()}"

    def write(name, text):
        fd = os.open(TRACING / name, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, f"{text}\n".encode())
        finally:
            os.close(fd)

    write("uprobe_events", f"p:{group}/call {path}:{offset:#x}")
    try:
        write(f"events/{group}/call/enable", "1")
        yield
    finally:
        write(f"events/{group}/call/enable", "0")
        write("uprobe_events", f"-:{group}/call")


@pytest.mark.skipif(not TRACEFS, reason="uprobes need root and /sys/kernel/tracing")
def test_an_image_is_written_without_the_breakpoints_of_uprobes(images, tmp_path):
    """Whoever executed one from an image, where no uprobe is known, would die of SIGTRAP."""
    library = build_library(tmp_path, "libbig.so")
    load = f"import ctypes; lib = ctypes.CDLL({str(library)!r}); first = lib.answer()"

    def left(report):
        (obj,) = [obj for obj in report["objects"] if obj["path"] == str(library)]
        return obj["backing"], obj["notes"], {why for s in obj["segments"] for why in s["left"]}

    with uprobe(library, "answer"), Process(sys.executable) as process:
        process.run(load)
        backing, _, why = left(process.prime(image_dir=str(images), backing="image"))
        assert process.run("result = lib.answer() == first")
        assert (backing, reasons.MODIFIED in why) == (None, True)
    with Process(sys.executable) as process:
        process.run(load)
        backing, notes, _ = left(process.prime(image_dir=str(images), backing="image"))
        assert process.run("result = lib.answer() == first")
        assert (backing, notes) == ("image", [])
