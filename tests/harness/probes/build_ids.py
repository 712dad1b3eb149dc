"""What eBPF tools do with an address: the mapping's file, its build-id, its symbols."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

from elftools.elf.elffile import ELFFile

from harness import outside
from harness.probes.registry import probe
from harness.probes.symbols import symbols
from harness.probes.target import NotHere, Target


def build_id(head: bytes) -> str:
    """The build-id as the kernel reads it for perf and eBPF (lib/buildid.c): program headers and
    note within the file's first page."""
    if head[:4] != b"\x7fELF":
        return ""
    (offset,) = struct.unpack_from("=Q", head, 32)
    size, count = struct.unpack_from("=HH", head, 54)
    for index in range(count):
        at = offset + index * size
        if at + size > len(head):
            break
        kind, _, start, _, _, length = struct.unpack_from("=IIQQQQ", head, at)
        while kind == 4 and length >= 12 and start + 12 <= len(head):
            namesz, descsz, note = struct.unpack_from("=III", head, start)
            name, end = start + 12, start + 12 + -(-namesz // 4) * 4 + -(-descsz // 4) * 4
            if note == 3 and head[name : name + 4] == b"GNU\0" and end <= len(head):
                return head[name + 4 : name + 4 + descsz].hex()
            length, start = length - (end - start), end
    return ""


@probe("build-id and symbols of a mapping's file")
def symbols_by_file(target: Target) -> dict[str, Any]:
    """What eBPF tools do with an address: the mapping's file, its build-id, and the symbol at the
    address's offset in that file."""
    found: dict[str, Any] = {}
    vmas = outside.smaps(target.pid)
    for name, address in json.loads(target.get("addresses")).items():
        vma = next(v for v in vmas if v.start <= address < v.end)
        path = f"/proc/{target.pid}/map_files/{vma.start:x}-{vma.end:x}"
        if not os.path.lexists(path):
            found[name] = "no file"
            continue
        try:
            file = open(path, "rb")  # closed by the next line
        except PermissionError:
            raise NotHere("needs CAP_CHECKPOINT_RESTORE, as root has") from None
        with file:
            identity = build_id(file.read(4096))
            found[name] = (
                symbol_at(file, vma.offset + address - vma.start) if identity else "no build-id"
            )
    return found


def symbol_at(file: Any, offset: int) -> str:
    elf = ELFFile(file)
    load = next(
        (
            h
            for h in elf.iter_segments("PT_LOAD")
            if h["p_offset"] <= offset < h["p_offset"] + h["p_filesz"]
        ),
        None,
    )
    if load is None:
        return "not in the file"
    address = load["p_vaddr"] + offset - load["p_offset"]
    return " ".join(
        sorted(name for name, _, value, _ in symbols(elf, ".dynsym") if value == address)
    )
