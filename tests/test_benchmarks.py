"""What benchmarks print is of what they were told to measure, and what they keep says of what."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness.container import container
from harness.interpreters import BASE, is_shared
from harness.kernel import require_huge_files
from harness.outside import PMD
from harness.privileges import has_images

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_code_on_huge_pages(tmp_path):
    """Of this interpreter, primed, all that can be; by the rule of the known tools never more."""
    result = tmp_path / "made" / "found.json"
    require_huge_files(tmp_path)
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "huge_code.py"), "--json", str(result), BASE],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert found["command"] == f"benchmarks/huge_code.py {BASE}"
    assert found["machine"]["cores"] >= 1
    assert found["commit"] or not (BENCHMARKS.parent / ".git").exists()
    (row,) = found["interpreters"]
    assert (row["kind"] == "shared") == is_shared(BASE)
    assert row["bytes"] >= row["attainable"] >= row["primed"]
    assert row["primed"] == row["attainable"] or not has_images()
    # A chunk of the executable segment may begin before the .text in it, and end behind it.
    assert row["per_segment"] < row["attainable"] + PMD
    assert row["version"] in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "given"), [((1,), ("--server", "celery")), ((1, 2), ("--container",))]
)
def test_a_row_for_each_variant(counts, given, tmp_path):
    require_huge_files(tmp_path)
    if "--container" in given:
        if os.geteuid():
            pytest.skip("mounts overlay file systems: needs root")
        with tempfile.TemporaryDirectory(prefix="page-primer-memory-", dir="/srv") as upper:
            container(Path(upper))  # or a skip
    else:
        pytest.importorskip("celery", reason="Celery is not installed")
    result = tmp_path / "found.json"
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--json", str(result), "--code"]
    many = ",".join(map(str, counts))
    done = subprocess.run(
        [*command, "--application", "small", "--workers", many, "--requests", "1", *given],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    assert all(title in done.stdout for title in found["mib"])
    assert found["mib"].keys() == {
        f"{count}: {variant}" for count in counts for variant in ("unprimed", "primed")
    }
    assert found["command"].startswith("benchmarks/memory.py --code --application small --workers ")
    assert ("--container" in found["command"]) == ("--container" in given)
    assert found["machine"]["cores"] and "--json" not in found["command"]
    for title, row in found["mib"].items():
        assert row["PSS tree"] == pytest.approx(row["a worker"] * int(title[0])), title
        assert row["RSS"] > row["private"] > 0, title
        primed = "un" not in title
        assert (row["locked"] > 0) == primed, title
        if primed:  # the page cache may have some code of the other's on huge pages, too
            assert row["code huge"] > found["mib"][title.replace("primed", "unprimed")]["code huge"]
