"""Inputs on which an earlier edition fell short (where they are beside the repository, in
../shared/cases): which test holds what is right for each."""

import ast
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
CASES = TESTS.parents[1] / "shared/cases"
HELD = {
    "capabilities": "test_trust.py::test_capabilities",
    "signals": "test_interrupted.py::test_what_a_signal_handler_raises_reaches_its_host",
    "fork-busy": "test_interrupted.py::"
    "test_a_fork_amid_another_threads_call_is_not_disturbed_by_a_handler",
    "unloaded": "test_interrupted.py::test_what_was_unloaded_is_forgotten",
    "limits": "test_run_hostile.py::test_exit_status_under_limits",
    "far-segment": "test_cases.py::test_a_far_segment",
    "core": "test_core_files.py::test_elfutils_reads_a_core_file_as_of_an_unprimed_process",
    "chain": "test_sitecustomize.py::test_a_tracer_before_ours",
    "uprobes": "test_cases.py::test_the_path_to_probe_is_documented",
    "dirty": "test_gunicorn_dirty.py::test_dirty_processes_are_huge_and_locked",
    "small-shm": "test_images.py::test_small_shm test_what_a_worker_takes_in_a_container",
}


def test_each_case_has_its_test():
    if not CASES.is_dir():
        pytest.skip("../shared is not here")
    assert {path.name for path in CASES.iterdir()} - {"README.md"} == set(HELD)


@pytest.mark.parametrize("case", HELD)
def test_the_test_of_a_case_is_there(case):
    file, _, names = HELD[case].partition("::")
    tree = ast.parse((TESTS / file).read_text())
    assert {*names.split()} <= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}


@pytest.mark.parametrize("shift", [44, 62])
def test_a_far_segment(tmp_path, shift):
    """A program whose writable segment is far away from its code is refused by `align`, ends under
    `run` as it does alone, and is no loop for either."""
    data = bytearray(Path(os.path.realpath(sys.executable)).read_bytes())
    table, count = struct.unpack_from("=Q", data, 32)[0], struct.unpack_from("=H", data, 56)[0]
    for at in range(table, table + 56 * count, 56):
        kind, flags, _, vaddr = struct.unpack_from("=IIQQ", data, at)
        if kind == 1 and flags & 2:
            struct.pack_into("=Q", data, at + 16, vaddr + (1 << shift))
    file = tmp_path / "python"
    file.write_bytes(data)
    file.chmod(0o755)
    environment = {**os.environ, "PAGE_PRIMER_ALIGNED": str(tmp_path / "list")}

    def ran(*command):
        return subprocess.run(
            [*map(str, command)], env=environment, capture_output=True, text=True, timeout=120
        )

    primer = [sys.executable, "-m", "page_primer"]
    refused = ran(*primer, "align", file)
    assert refused.returncode == 1, refused
    assert "far apart" in refused.stdout + refused.stderr
    # How it ends, with and without our command before it.
    words = f'exec "$@" {file} -c 1'
    alone, primed = (
        ran("sh", "-c", words, "sh", *way) for way in (["env"], [*primer, "run", "--"])
    )
    assert primed.returncode == alone.returncode != 0, (primed, alone)
    assert file.read_bytes() == data


def test_the_path_to_probe_is_documented():
    """A uprobe on the interpreter's own path does not fire where it runs from an image: another
    path has it, and the table of tools says so."""
    rows = (TESTS.parent / "docs/tools.md").read_text().splitlines()
    own = [row for row in rows if row.startswith("| uprobe on the interpreter's path |")]
    mapped = [row for row in rows if row.startswith("| uprobe on the path in /proc/PID/maps |")]
    assert own and len(own) == len(mapped)
    assert any("cannot" in row for row in own) and any("works" in row for row in mapped)
    # What cannot be, a numbered note explains.
    for number in {cell.split("(")[1][:-1] for row in own for cell in row.split(" | ")[1:]
                   if cell.startswith("cannot (") and cell.endswith(")")}:  # fmt: skip
        assert [row for row in rows if row.startswith(f"{number}. ")], number
