"""Core files of the kernel's, read with elfutils (as systemd-coredump does): build-ids and frames
are what they are of an unprimed process."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

import page_primer

_, LIMIT = resource.getrlimit(resource.RLIMIT_CORE)
PATTERN = Path("/proc/sys/kernel/core_pattern").read_text().strip()

pytestmark = [
    pytest.mark.skipif(
        not (shutil.which("eu-unstrip") and shutil.which("eu-stack")), reason="no elfutils"
    ),
    pytest.mark.skipif(
        PATTERN[:1] in "|/" or "/" in PATTERN,
        reason=f"core files are not written to the current directory (core_pattern {PATTERN!r})",
    ),
    pytest.mark.skipif(
        LIMIT != resource.RLIM_INFINITY and LIMIT < 64 << 20,
        reason=f"core files are limited to {LIMIT} bytes (ulimit -Hc)",
    ),
]

PROGRAM = """
import os, resource, sys
import page_primer
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
if sys.argv[1] != "unprimed":
    report = page_primer.prime(backing=sys.argv[1], image_dir=sys.argv[2], mlock=False)
    if report.interpreter is None or report.interpreter.backing != sys.argv[1]:
        sys.exit(f"not moved: {report}")
os.abort()
"""


def core_of(python: str, how: str, directory: Path) -> Path:
    directory.mkdir()
    root = str(Path(page_primer.__file__).parents[1])
    packages = [root, *(path for path in sys.path if path.endswith("site-packages"))]
    done = subprocess.run(
        [python, "-c", PROGRAM, how, str(directory.parent / "images")], cwd=directory,
        env={**os.environ, "PYTHONPATH": ":".join(packages)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    if "not moved" in done.stderr:
        pytest.skip(f"{how} is unavailable here: {done.stderr[:200]}")
    (core,) = directory.glob("core*")
    return core


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout


def modules(core: Path) -> dict[str, str]:
    """Build-id -> where in memory it is, for what has one address in every process."""
    found = re.findall(r"^0x([0-9a-f]+)\+0x[0-9a-f]+ ([0-9a-f]{40})@", output(
        "eu-unstrip", "-n", f"--core={core}"), re.MULTILINE)  # fmt: skip
    return {build_id: address for address, build_id in found}


def frames(core: Path, *options: str) -> list[str]:
    text = output("eu-stack", *options, f"--core={core}")
    return re.findall(r"^#\d+ +0x[0-9a-f]+ *(.*)$", text, re.MULTILINE)


def build_id_of(path: str) -> str:
    with open(path, "rb") as file:
        notes = ELFFile(file).get_section_by_name(".note.gnu.build-id")
        return next(note["n_desc"] for note in notes.iter_notes()) if notes else ""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["image", "memfd", "anonymous"])
def test_elfutils_reads_a_core_file_as_of_an_unprimed_process(base, how, tmp_path):
    unprimed, primed = (core_of(base, name, tmp_path / name) for name in ("unprimed", how))
    program = os.path.realpath(base)
    expected, seen = modules(unprimed), modules(primed)
    assert build_id_of(program) in expected
    # The images' own apart; and what prime() imports (fcntl) may come in addition.
    assert not expected.keys() - seen.keys()
    with open(program, "rb") as file:
        fixed = ELFFile(file)["e_type"] == "ET_EXEC"
    if fixed:  # the same address in each
        assert seen[build_id_of(program)] == expected[build_id_of(program)]
    # Of a program that lies in memory without a file elfutils has to be told the file.
    options = ["-e", program] if fixed and how != "image" else []
    names = frames(unprimed)
    assert any("PyEval" in name for name in names)
    assert frames(primed, *options) == names
