"""Huge pages in the mappings that the loader made: nothing is copied."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import outside
from harness.kernel import require_huge_files
from harness.placement import require_executable
from harness.process import Process

PMD = outside.PMD
CODE = 1_300_000  # instructions of four bytes: five megabytes, two whole huge pages

# One `R E` PT_LOAD at offset 0 and p_align of a huge page: what a linker makes of these two
# options, and alignment of any file.
ALIGNED = (f"-Wl,-z,max-page-size={PMD}", "-Wl,-z,noseparate-code")


@pytest.fixture(scope="session")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that is linked for huge pages."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc (Debian's build-essential)")
    if os.uname().machine != "x86_64":
        pytest.skip("the library is written in x86-64's assembly language")
    directory = tmp_path_factory.mktemp("aligned")
    source, made = directory / "count.c", directory / "linked.so"
    source.write_text(
        '__asm__(".text\\n.globl count\\n.type count,@function\\ncount:\\n'
        f'.fill {CODE}, 4, 0x017f8d48\\n mov %rdi,%rax\\n ret\\n");\n'  # lea 1(%rdi),%rdi
    )
    subprocess.run(["gcc", "-shared", "-o", made, source, *ALIGNED], check=True)
    return made


def copy(linked: Path, target: Path, block: int) -> str:
    """Write a copy in pieces of `block` bytes, which decide its pages in the cache."""
    data = linked.read_bytes()
    with open(target, "wb", buffering=0) as file:
        for at in range(0, len(data), block):
            file.write(data[at : at + block])
    return str(target)


@pytest.fixture
def huge(linked: Path, tmp_path: Path) -> str:
    """The library, in memory on huge pages as soon as it is mapped."""
    require_huge_files(tmp_path)
    return copy(linked, tmp_path / "huge.so", PMD)


@pytest.fixture
def small(linked: Path, tmp_path: Path) -> str:
    """The library, in memory on small pages."""
    return copy(linked, tmp_path / "small.so", 32 << 10)


def load(process: Process, path: str) -> None:
    call = f"import ctypes; library = ctypes.CDLL({path!r}); result = library.count(1)"
    assert process.run(call) == CODE + 1


def of(report: dict, path: str) -> dict:
    return next(obj for obj in report["objects"] if obj["path"] == path)


def mappings(process: Process, path: str) -> list:
    return [vma for vma in outside.smaps(process.pid) if vma.path == path]


def code_of(process: Process, path: str):
    (vma,) = [vma for vma in mappings(process, path) if vma.perms == "r-xp"]
    return vma


def test_code_that_is_huge_already_is_not_copied(python, huge, images):
    with Process(python) as process:
        load(process, huge)
        before = [vma.file_mapping for vma in mappings(process, huge)]
        assert code_of(process, huge).huge == 2 * PMD
        report = process.prime(include=["huge.so"], image_dir=str(images))
        found = of(report, huge)
        assert (found["backing"], found["aligned"], found["copied_bytes"]) == ("already", True, 0)
        assert found["code_huge_bytes"] == code_of(process, huge).huge == 2 * PMD
        assert not images.exists()
        assert [vma.file_mapping for vma in mappings(process, huge)] == before
        assert "lo" in code_of(process, huge).flags
        load(process, huge)
        child = process.run(
            "import os\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            "    child = page_primer.prime().as_dict()\n"
            f"    obj = next(o for o in child['objects'] if o['path'] == {huge!r})\n"
            "    os._exit(obj['backing'] != 'already' or obj['code_huge_bytes'] // (2 << 20))\n"
            "result = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])"
        )
        assert child == 2 * PMD // (2 << 20)
        found = of(process.restore(), huge)
        assert found["backing"] is None
        assert "lo" not in code_of(process, huge).flags
        assert [vma.file_mapping for vma in mappings(process, huge)] == before
        load(process, huge)


def test_no_backing_copies_what_is_huge_already(python, huge, images):
    with Process(python) as process:
        load(process, huge)
        report = process.prime(include=["huge.so"], image_dir=str(images), backing="memfd")
        assert of(report, huge)["backing"] == "already"
        assert code_of(process, huge).path == huge


@pytest.mark.images
def test_small_pages_of_an_aligned_file_become_an_image_where_the_kernel_cannot_collapse(
    python, small, images
):
    require_huge_files(images.parent)
    with Process(python) as process:
        load(process, small)
        report = process.prime(include=["small.so"], image_dir=str(images))
        found = of(report, small)
        assert found["aligned"]
        if found["backing"] == "in_place":  # Linux 7.2, or CONFIG_READ_ONLY_THP_FOR_FS
            assert code_of(process, small).huge == 2 * PMD
            assert not images.exists()
            return
        assert found["backing"] == "image"
        assert found["notes"] == [f"in place: 0 of {2 * PMD} bytes huge"]
        # What is left on the file is what no whole huge page can cover.
        left = [vma for vma in mappings(process, small) if "x" in vma.perms]
        assert not [vma for vma in left if -vma.start % PMD + PMD <= vma.end - vma.start]
        assert found["code_huge_bytes"] == 2 * PMD
        # Its image is where every process finds it: the load address is the same modulo 2 MiB.
        (folder,) = [entry for entry in images.iterdir() if entry.name[0].isdigit()]
        assert folder.name.split("-")[-2] == "0"
        process.restore()
        assert code_of(process, small).path == small
        load(process, small)


def test_in_place_by_name_copies_nothing(python, small, images):
    with Process(python) as process:
        load(process, small)
        report = process.prime(image_dir=str(images), backing="in_place")
        assert not images.exists()
        assert report["copied_bytes"] == 0
        assert code_of(process, small).path == small
        found = of(report, small)
        assert found["code_huge_bytes"] == code_of(process, small).huge
        assert found["backing"] == ("in_place" if found["code_huge_bytes"] else None)


def test_collapse_in_place_on_tmpfs(python, linked, images):
    require_huge_files("/dev/shm")
    require_executable("/dev/shm")
    path = copy(linked, Path(f"/dev/shm/page-primer-test-{os.getpid()}.so"), 32 << 10)
    try:
        with Process(python) as process:
            load(process, path)
            assert code_of(process, path).huge == 0
            report = process.prime(include=["page-primer-test-*"], image_dir=str(images))
            found = of(report, path)
            assert (found["backing"], found["copied_bytes"]) == ("in_place", 0), str(found)
            assert found["code_huge_bytes"] == code_of(process, path).huge == 2 * PMD
            assert not images.exists()
            load(process, path)
            with Process(python) as other:  # one copy, for whoever maps the file
                load(other, path)
                assert code_of(other, path).huge == 2 * PMD
                assert code_of(other, path).kb["Private_Clean"] == 0
    finally:
        os.unlink(path)


def test_a_deleted_file_can_have_huge_pages_in_place(python, linked, images):
    require_huge_files("/dev/shm")
    require_executable("/dev/shm")
    path = copy(linked, Path(f"/dev/shm/page-primer-test-gone-{os.getpid()}.so"), 32 << 10)
    try:
        with Process(python) as process:
            load(process, path)
            os.unlink(path)
            report = process.prime(include=["page-primer-test-*"], image_dir=str(images))
            assert of(report, path)["backing"] == "in_place", str(of(report, path))
            assert code_of(process, f"{path} (deleted)").huge == 2 * PMD
    finally:
        Path(path).unlink(missing_ok=True)


def test_of_what_cannot_be_copied_a_part_is_good_enough(python, linked, images):
    """Where its mapping reaches farther than its code (glibc 2.43), or a page is held by others."""
    require_huge_files("/dev/shm")
    require_executable("/dev/shm")
    path = copy(linked, Path(f"/dev/shm/page-primer-test-part-{os.getpid()}.so"), 32 << 10)
    held, holder = os.pipe()
    try:
        with Process(python) as process, open(path, "rb") as file:
            load(process, path)
            assert os.splice(file.fileno(), holder, 4096, PMD) == 4096
            os.unlink(path)
            report = process.prime(include=["page-primer-test-*"], image_dir=str(images))
            found = of(report, path)
            assert found["backing"] == "in_place", str(found)
            assert found["code_huge_bytes"] == code_of(process, f"{path} (deleted)").huge == PMD
    finally:
        os.close(held)
        os.close(holder)
        Path(path).unlink(missing_ok=True)


def test_a_library_over_the_limit_is_not_brought_in(python, small, images):
    with Process(python) as process:
        load(process, small)
        report = process.prime(
            include=["small.so"], image_dir=str(images), limit=PMD - 1, mlock=False
        )
        found = of(report, small)
        assert found["backing"] is None
        assert any("over the limit" in segment["left"] for segment in found["segments"])


def test_the_log_names_what_spares_the_copy(python, images):
    require_huge_files(images.parent)
    with Process(python) as process:
        told = process.run(
            "import page_primer\n"
            f"report = page_primer.prime(image_dir={str(images)!r}, backing='image')\n"
            "result = report.interpreter.backing, report.summary()"
        )
        backing, summary = told
        assert ("no copy with `page-primer align`" in summary) is (backing == "image")
