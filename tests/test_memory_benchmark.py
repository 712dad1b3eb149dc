"""benchmarks/memory.py: what it prints is of the servers that it was told to start."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness.container import container
from harness.kernel import require_huge_files

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"


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
    command = [sys.executable, str(SCRIPT), "--code", "--application", "small", "--json"]
    done = subprocess.run(
        [*command, "--workers", ",".join(map(str, counts)), "--requests", "1", *given],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mib"].keys() == {
        f"{count}: {variant}" for count in counts for variant in ("unprimed", "primed")
    }
    assert found["container"] == ("--container" in given)
    for title, row in found["mib"].items():
        assert row["PSS tree"] == pytest.approx(row["a worker"] * int(title[0])), title
        assert row["RSS"] > row["private"] > 0, title
        primed = "un" not in title
        assert (row["locked"] > 0) == primed, title
        if primed:  # the page cache may have some code of the other's on huge pages, too
            assert row["code huge"] > found["mib"][title.replace("primed", "unprimed")]["code huge"]
