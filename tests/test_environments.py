"""Each hostile environment of hostile_places.py: the host lives, answers, ends normally, and the
report names the reason; docs/environments.md has a row for each."""

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from harness import environments, hostile_places
from harness.documents import ROOT
from harness.hostile_guests import GUESTS
from harness.hostile_places import TABLE
from harness.kernel import filesystem, release
from harness.system_calls import calls_in_use

DOCUMENT = (ROOT / "docs/environments.md").read_text()


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


def test_what_the_kernel_does_not_have_is_unavailable(python, folder):
    """test_hostile_guests.py tries the same in kernels that lack what is used."""
    unknown = environments.Environment("none", "", before=hostile_places.prctl(0x70700000))
    with pytest.raises(environments.Unavailable, match="no such prctl"):
        environments.observe(unknown, python, folder)


def rows_of(part):
    """The cells of a table's rows, without its head."""
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines][1:]


def test_the_document_has_each_environment():
    rows = rows_of(DOCUMENT.partition("## ")[0])
    names = [one.name for one in TABLE if not one.hours]
    assert [row[0] for row in rows] == names + [guest.name for guest in GUESTS]
    how = {one.name: one.how for one in TABLE}
    for name, made, outcome, reason in rows:
        assert made == how.get(name, made)
        assert outcome.startswith((environments.PRIMED, environments.NOT)), name
        if not outcome.startswith(f"{environments.PRIMED}: "):
            assert reason, name


def test_the_document_has_each_system_call_in_use(python, folder):
    """Where it was written: another kernel, C library or Python makes others."""
    written = re.search(r"Linux (\S+), CPython (\S+), (.*?)\. ", DOCUMENT)
    here = ".".join(map(str, release())), ".".join(map(str, sys.version_info[:3])), "as root"
    if written.groups() != here or os.geteuid() or filesystem(folder) != "ext2/ext3":
        pytest.skip(f"docs/environments.md was written with {written[0]} on ext4")
    rows = rows_of(DOCUMENT.partition("## System calls")[2])
    assert {row[0] for row in rows} == set(calls_in_use(folder, python))
