"""Each hostile environment of hostile_places.py: the host lives, answers, ends normally, and the
report names the reason."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from harness import environments
from harness.hostile_places import TABLE


@pytest.fixture
def folder():
    """Where other users may look, on disk: not under pytest's own directories, which are ours."""
    path = Path(tempfile.mkdtemp(prefix="page-primer-env-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(one, id=one.name, marks=pytest.mark.slow if one.slow else ())
        for one in TABLE
        if not one.hours
    ],
)
def test_the_host_lives_and_the_report_tells_why(environment, python, folder):
    try:
        row = environments.observe(environment, python, folder)
    except environments.Unavailable as why:
        pytest.skip(str(why))
    assert row.outcome
    assert os.listdir(folder)
