"""What a report warns of: once, with the reason and the remedy."""

import logging

import pytest
from harness.privileges import has_images
from harness.process import Process

from page_primer._lean import replace
from page_primer.kernel import credentials
from page_primer.kernel.credentials import Credentials
from page_primer.outcome import ObjectReport
from page_primer.report import Report

MIB = 1 << 20

CORE = ObjectReport(
    path="/usr/lib/libpython3.11.so.1.0", interpreter=True, backing="image",
    where="/srv/images/3-x/libpython3.11.so.1.0", code_bytes=2 * MIB, code_huge_bytes=2 * MIB,
    huge_bytes=4 * MIB, locked_bytes=6 * MIB, copied_bytes=6 * MIB, written_bytes=0, segments=(),
    notes=(), attainable_bytes=2 * MIB, sharing="shared",
)  # fmt: skip
IN_MEMORY = replace(
    CORE, backing="memfd", where="memfd", code_huge_bytes=MIB, sharing="private",
    notes=("/srv/images: Permission denied",),
)  # fmt: skip


def lines(report, since=None):
    """What log() writes above DEBUG: levels and messages."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append((record.levelname, record.getMessage()))

    logger = logging.Logger("test", logging.INFO)
    logger.addHandler(Keep())
    report.log(logger, since=since)
    return found


def of(core, **more):
    return Report(pid=1, reason=None, objects=(core,), moved=(core.path,), **more)


def warnings(report, since=None):
    return [line for level, line in lines(report, since) if level == "WARNING"]


def test_what_was_got_is_no_warning():
    assert warnings(of(CORE)) == []
    assert warnings(of(CORE, warn=("image_dir",), image_dir="/srv/images")) == []
    assert warnings(of(CORE, warn=("backing",), backing="image")) == []
    already = replace(CORE, backing="already", where=None, copied_bytes=0, sharing=None)
    assert (
        warnings(of(already, warn=("image_dir", "backing"), image_dir="/x", backing="memfd")) == []
    )
    # A layout that allows no more is no shortfall.
    small = replace(CORE, code_huge_bytes=MIB, attainable_bytes=MIB)
    assert warnings(of(small)) == []


def test_less_than_the_layout_allows_is_one_warning_with_reason_and_remedy():
    (line,) = warnings(of(IN_MEMORY))
    assert line.startswith(
        "page-primer: 50.0 % of libpython3.11.so.1.0's code on huge pages, 100 % are possible "
        "(/srv/images: Permission denied): "
    )
    assert "page-primer align" in line
    assert ("PAGE_PRIMER_IMAGE_DIR" if has_images() else "page-primer build") in line
    # In a worker it is the same, and said once.
    assert warnings(replace(of(IN_MEMORY), pid=2), since=of(IN_MEMORY)) == []


@pytest.mark.parametrize(
    ("who", "remedy"),
    [
        (Credentials(1000), "name a directory of this user"),
        (Credentials(65534), "`page-primer build` as root"),
        (Credentials(1000, "it has capabilities"), "`page-primer build` as root"),
    ],
)
def test_a_remedy_is_one_for_this_user(monkeypatch, who, remedy):
    """Whose own files are not to be trusted, a directory of its own is none."""
    monkeypatch.setattr(credentials, "read", lambda: who)
    monkeypatch.setitem(credentials._names, 1000, True)  # as outside of a namespace
    (line,) = warnings(of(IN_MEMORY))
    assert f"run `page-primer align` once, or {remedy}" in line


def test_a_directory_or_backing_that_was_named_and_not_used_is_one_warning():
    named = of(IN_MEMORY, warn=("image_dir",), image_dir="/srv/images")
    (line,) = warnings(named)
    assert "image directory /srv/images not used (/srv/images: Permission denied)" in line
    nothing = replace(
        IN_MEMORY, backing=None, where=None, code_huge_bytes=0, copied_bytes=0, sharing=None,
        notes=("hugetlb: no pages",),
    )  # fmt: skip
    (line,) = warnings(of(nothing, warn=("backing", "remap"), backing="hugetlb"))
    assert "backing hugetlb not used (hugetlb: no pages)" in line
    # A directory beside it is another one.
    other = of(CORE, warn=("image_dir",), image_dir="/srv/image")
    assert len(warnings(other)) == 1


def test_sizes_of_copies_are_in_the_line():
    assert "; copied: 6.0 MiB shared; " in of(CORE).summary()
    report = of(CORE)
    both = replace(report, objects=(CORE, replace(IN_MEMORY, interpreter=False, path="/lib/x")))
    assert "; copied: 6.0 MiB shared, 6.0 MiB private; " in both.summary()
    assert (both.as_dict()["shared_bytes"], both.as_dict()["private_bytes"]) == (6 * MIB, 6 * MIB)


def test_a_named_directory_that_cannot_be_used(python, tmp_path):
    (tmp_path / "file").write_text("")
    directory = str(tmp_path / "file" / "images")
    with Process(python) as process:
        found = process.run(
            "import logging, page_primer\n"
            "class Keep(logging.Handler):\n"
            "    def emit(self, record):\n"
            "        if record.levelno >= logging.WARNING: lines.append(record.getMessage())\n"
            "lines, logger = [], logging.getLogger('test')\n"
            "logger.addHandler(Keep()); logger.propagate = False\n"
            f"report = page_primer.prime(image_dir={directory!r}, mlock=False)\n"
            "report.log(logger); result = lines"
        )
        if process.run("result = report.interpreter.backing in ('already', 'in_place')"):
            assert found == []
            return
        (line,) = found
        assert f"image directory {directory} not used ({directory}: " in line


def test_a_private_copy_is_its_childs_as_well(python):
    """What one process made for itself is shared from the first fork on."""
    with Process(python) as process:
        report = process.prime(backing="memfd", keep_profilers=False, mlock=False)
        if not report["copied_bytes"]:
            return
        assert report["private_bytes"] == report["copied_bytes"]
        assert report["resident_bytes"] > 0
        shared, copied = process.run(
            "import os, json\nreading, told = os.pipe()\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    again = page_primer.prime(backing='memfd', keep_profilers=False, mlock=False)\n"
            "    os.write(told, json.dumps([again.shared_bytes, again.copied_bytes]).encode())\n"
            "    os._exit(0)\n"
            "os.waitpid(child, 0); result = json.loads(os.read(reading, 1000))"
        )
        assert shared == copied == report["copied_bytes"]
