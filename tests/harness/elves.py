"""ELF files to align: copies of interpreters, and libraries linked here in every layout."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from harness.outside import PMD


def source(filling: int) -> str:
    """A library with so many bytes of code, of which filling() executes all, and read-only data
    before and behind it."""
    return f"""
const int table[1024] = {{[0] = 5, [1] = 7}};
static int counter = 3;
int blank[4096];
static __thread int local = 4;
int *where(void) {{ return &counter; }}
int answer(int n) {{ blank[n] += table[n]; return table[n] + counter++ + local++ + blank[n]; }}
__asm__(".text\\n.globl filling\\nfilling:\\n.fill {filling}, 1, 0x90\\nret\\n");
"""


SOURCE = source(PMD + PMD // 2)  # a little more than one huge page

PROTECTED = {
    "x86_64": ["-fcf-protection=full", "-Wl,-z,ibt,-z,shstk"],
    "aarch64": ["-mbranch-protection=standard", "-Wl,-z,force-bti"],
}.get(platform.machine(), [])
LAYOUTS = {
    "bfd": ["-fuse-ld=bfd", "-Wl,-z,separate-code"],
    "bfd, R and RX in one": ["-fuse-ld=bfd", "-Wl,-z,noseparate-code"],
    "bfd, 64 KiB pages": ["-fuse-ld=bfd", "-Wl,-z,separate-code,-z,max-page-size=65536"],
    "bfd, RELR": ["-fuse-ld=bfd", "-Wl,-z,pack-relative-relocs"],
    "bfd, 2 MiB pages": ["-fuse-ld=bfd", f"-Wl,-z,separate-code,-z,max-page-size={PMD}"],
    "gold": ["-fuse-ld=gold"],
    "lld": ["-fuse-ld=lld"],
    "lld, R and RX in one": ["-fuse-ld=lld", "-Wl,--no-rosegment"],
    "lld, separate": ["-fuse-ld=lld", "-Wl,-z,separate-code"],
    "mold": ["-fuse-ld=mold"],
    # In .note.gnu.property: IBT and shadow stacks, or BTI.
    "branch protection": ["-fuse-ld=bfd", "-Wl,-z,separate-code", *PROTECTED],
}


# For bfd's -T: no segment has the headers, so that all offsets change.
HEADERS_APART = """
PHDRS { text PT_LOAD FLAGS(5); data PT_LOAD FLAGS(6); dynamic PT_DYNAMIC FLAGS(6);
        stack PT_GNU_STACK FLAGS(6); }
SECTIONS {
    . = 0;
    .hash : { *(.hash) *(.gnu.hash) } :text
    .dynsym : { *(.dynsym) } .dynstr : { *(.dynstr) } .rela : { *(.rela*) }
    .text : { *(.text*) } .rodata : { *(.rodata*) *(.eh_frame*) *(.note*) }
    . = ALIGN(0x1000);
    .dynamic : { *(.dynamic) } :data :dynamic
    .got : { *(.got*) } :data
    .data : { *(.data*) }
    .bss : { *(.bss*) }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be copied."""
    return link(tmp_path_factory.mktemp("library") / "libx.so", "-Wl,-z,separate-code")


@pytest.fixture
def file(library: Path, tmp_path: Path) -> Path:
    """A copy of it, in a directory of its own."""
    (tmp_path / "place").mkdir()
    return Path(shutil.copy2(library, tmp_path / "place" / "libx.so"))


def link(target: Path, *options: str, source: str = SOURCE) -> Path:
    """Link a library, or skip where this toolchain cannot."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    code = target.with_suffix(".c")
    code.write_text(source)
    command = ["gcc", "-g", "-O1", "-fPIC", *options, "-o", str(target), str(code)]
    if not {"-static", "-static-pie", "-pie", "-no-pie", "-c"} & set(options):
        command.insert(1, "-shared")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this toolchain does not link that: {done.stderr.strip().splitlines()[-1]}")
    return target


def digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def loaded(path: Path | str) -> dict[int, bytes]:
    """The bytes that each PT_LOAD brings to its address, but for the ELF headers."""
    content = Path(path).read_bytes()
    (table,) = struct.unpack_from("=Q", content, 32)
    (count,) = struct.unpack_from("=H", content, 56)
    found = {}
    for kind, _, offset, vaddr, _, size, *_ in struct.iter_unpack(
        "=IIQQQQQQ", content[table : table + 56 * count]
    ):
        if kind != 1:
            continue
        data = bytearray(content[offset : offset + size])
        for low, high in ((0, 64), (table, table + 56 * count)):
            low, high = low - offset, high - offset
            if 0 <= low < len(data):
                high = min(high, len(data))
                data[low:high] = bytes(high - low)
        found[vaddr] = bytes(data)
    return found


def loads(path: Path | str) -> list[Any]:
    with open(path, "rb") as file:
        return [segment.header for segment in ELFFile(file).iter_segments("PT_LOAD")]


def same_in_memory(before: dict[int, bytes], after: dict[int, bytes]) -> bool:
    """Whether every byte of `before` is at its address in `after`."""
    return all(
        any(
            low <= address and address + len(data) <= low + len(other)
            and other[address - low : address - low + len(data)] == data
            for low, other in after.items()
        )
        for address, data in before.items()
    )  # fmt: skip


def answers(path: Path | str, whole: bool = True) -> list[int]:
    """What the library that SOURCE makes computes, in a process of its own; all of its code is
    executed, or little."""
    program = (
        "import ctypes, json, sys; lib = ctypes.CDLL(sys.argv[1])\n"
        f"{whole} and lib.filling()\n"
        "print(json.dumps([lib.answer(n % 3) for n in range(9)]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True,
                          text=True, check=True)  # fmt: skip
    return json.loads(done.stdout)


def copy_of_libpython(python: str, to: Path) -> Path | None:
    """A copy of an interpreter's libpython, for LD_LIBRARY_PATH or LD_PRELOAD."""
    question = "print(open('/proc/self/maps').read())"
    maps = subprocess.run([python, "-I", "-S", "-c", question], capture_output=True, text=True)
    found = re.search(r"(/\S*/libpython3\S*)", maps.stdout)
    if found is None:
        return None
    return Path(shutil.copy2(found[1], to / os.path.basename(found[1])))


def huge_files_here(directory: Path) -> str | None:
    """Why files in a directory are not mapped huge by the kernel itself; None where they are."""
    program = (
        "import ctypes, mmap, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "size = 2 * int(sys.argv[2])\n"
        "for at in range(0, size, size // 2): os.pwrite(fd, bytes([144]) * (size // 2), at)\n"
        "os.fsync(fd)\n"
        # At a huge page boundary, as the loader maps what is aligned: on overlayfs other mappings
        # have any address.
        "libc = ctypes.CDLL(None)\n"
        "libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [\n"
        "    ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]\n"
        "at = libc.mmap(None, 2 * size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)\n"
        "at = -(-at // (size // 2)) * (size // 2)\n"
        "at = libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_EXEC,\n"
        "               mmap.MAP_PRIVATE | 0x10, fd, 0)\n"  # MAP_FIXED
        "ctypes.string_at(at, 1), ctypes.string_at(at + size // 2, 1)\n"
        "text = open('/proc/self/smaps').read().split(sys.argv[1])[1]\n"
        "print(text.split('FilePmdMapped:')[1].split()[0])"
    )
    probe = directory / "probe-for-huge-pages"
    done = subprocess.run([sys.executable, "-c", program, str(probe), str(PMD)],
                          capture_output=True, text=True)  # fmt: skip
    probe.unlink(missing_ok=True)
    if done.returncode or int(done.stdout) == 0:
        return "this kernel and file system map no file huge by themselves (ext4 does from 6.16)"
    return None
