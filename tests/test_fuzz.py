"""The targets of tools/fuzz, for a moment: what was found once, and some mutations more."""

import contextlib
import errno
import io
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from harness import fuzz_loop, fuzz_targets
from harness.process import Process
from harness.servers import catches, children, wait_for

from page_primer import plan, survey
from page_primer.align import layout, original, rewrite, verify
from page_primer.elf.objects import Object, Source, segments_of
from page_primer.kernel import memory, mounts
from page_primer.options import Options

ROOT = Path(__file__).parents[1]
# As many as take some tenths of a second.
EXECUTIONS = {"align": 60, "maps": 300, "program_headers": 300}


@pytest.fixture(autouse=True, scope="module")
def scratch():
    yield
    fuzz_targets.clean_up()


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_nothing_is_found(name):
    target = fuzz_targets.TARGETS[name]
    corpus = target.corpus()
    if not corpus:
        pytest.skip("no gcc to link small libraries with")
    executions = len(corpus) + EXECUTIONS.get(name, 500)
    tally = fuzz_loop.run(target, seed=12, executions=executions)
    assert tally.executions == executions
    assert tally.accepted > len(target.seeds()) / 2, "almost nothing is accepted: a poor test"
    assert {where: find.text for where, find in tally.finds.items()} == {}


def test_a_fault_is_found():
    """The loop itself: it finds what is one change away from its corpus, and keeps one of each."""

    def faulty(data):
        if data[:1] == b"\x7f" and data[16:17] != b"\x03":
            raise KeyError(data[16])
        return True

    if shutil.which("gcc") is None:
        pytest.skip("no gcc to link small libraries with")
    target = fuzz_targets.Target(faulty, fuzz_targets.libraries)
    tally = fuzz_loop.run(target, seed=1, executions=3000)
    (where,) = tally.finds
    assert where.startswith("KeyError at test_fuzz.py:")
    assert tally.finds[where].data[16:17] != b"\x03"


@pytest.mark.slow
@pytest.mark.parametrize("begun", [False, True], ids=["at once", "at work"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_ended_says_its_line(tmp_path, number, begun):
    """A terminal's Ctrl-C goes to all of its processes, SIGTERM to the one that is known."""
    command = [sys.executable, ROOT / "tools/fuzz", "--engine", "mutations", "--work", tmp_path]
    with subprocess.Popen(
        [*command, "--seconds", "600", "maps", "cgroup"], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as run:  # fmt: skip
        try:
            wait_for(lambda: children(run.pid), "a child")
            (child,) = children(run.pid)
            if begun:
                wait_for(lambda: catches(child, signal.SIGTERM), "its loop")
            os.kill(run.pid if number == signal.SIGTERM else -run.pid, number)
            said, _ = run.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 128 + number, said
    assert re.fullmatch(r"maps: mutations, .* executions, .* accepted, 0 finds\n", said), said
    assert not os.path.exists(f"/proc/{child}")


# What was found, and what it meant.


@pytest.mark.parametrize("name", ["a\u2028b", "a\x0bb", "a\x1cb", os.fsdecode(b"a\xffb")])
def test_a_cgroup_of_any_name_has_its_limit(tmp_path, name):
    """A name that splitlines() cuts made prime() give up; one that is no UTF-8 hid the limit."""
    mounted = "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    files = {
        "proc/self/mountinfo": mounted, "proc/self/cgroup": f"0::/{name}\n",
        f"sys/fs/cgroup/{name}/memory.max": "1048576\n",
        f"sys/fs/cgroup/{name}/memory.current": "4096\n",
    }  # fmt: skip
    for path, text in files.items():
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(os.fsencode(text))
    assert memory.read(str(tmp_path)).available == 1048576 - 4096


@pytest.mark.parametrize("name", ["a\u2028b", "a\x0bb", "a\\134b", "a\\999b"])
def test_a_mount_point_of_any_name_is_found(name):
    text = f"1 0 0:1 / / rw - ext4 x rw\n2 1 0:2 / /mnt/{name} rw - tmpfs x rw\n"
    plain = name.replace("\\134", "\\")
    assert mounts.mount_of(f"/mnt/{plain}/images", mounts.parse(text)).filesystem == "tmpfs"


def test_status_of_a_process_with_a_made_up_file_has_an_end(tmp_path, python):
    """It tried for ever to find the rest of a file whose headers do not say what is mapped."""
    made_up = fuzz_targets.FOLDER / "examined" / "segment-that-is-mapped-elsewhere"
    file = tmp_path / "made-up"
    file.write_bytes(made_up.read_bytes().ljust(0x10000, b"\0"))
    with Process(python) as process:
        process.run(
            f"import mmap; file = open({str(file)!r}, 'rb')\n"
            "kind = dict(flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)\n"
            "kept = [mmap.mmap(file.fileno(), 4096, offset=at, **kind) for at in (0, 0x9000)]"
        )
        command = [sys.executable, "-m", "page_primer", "status", "--json", str(process.pid)]
        done = subprocess.run(command, capture_output=True, timeout=60, check=True)
        assert b"python" in done.stdout


def test_a_record_that_points_beyond_the_file_is_none(tmp_path):
    """It ended `page-primer align --check` with a traceback."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to link small libraries with")
    data = bytearray(fuzz_targets.aligned_libraries()[0])
    (length,) = struct.unpack_from("=Q", data, len(data) - rewrite._TRAILER.size + 16)
    copy = len(data) - rewrite._TRAILER.size - length + rewrite._COUNTS.size
    for field in range(3):
        damaged = bytearray(data)
        struct.pack_into("=Q", damaged, copy + 8 * field, 1 << 63)
        file = tmp_path / f"damaged-{field}.so"
        file.write_bytes(damaged)
        with open(file, "rb") as opened:
            assert rewrite.read_record(opened.fileno()) is None


def test_what_cannot_be_read_does_not_become_readable():
    """A PT_LOAD without any permission, between others."""
    load = struct.Struct("=IIQQQQQQ")
    size = 2 << 20
    table = b"".join(
        load.pack(1, flags, n * size, n * size, 0, size, size, 4096)
        for n, flags in enumerate((4, 5, 0, 4))
    )
    segments = segments_of(table, fuzz_targets.BASE, fuzz_targets.PAGE)
    source = Source("/lib/x.so", 1, 2, 3, 4, 5)
    obj = Object("x", "/lib/x.so", fuzz_targets.BASE, table, segments, source=source)
    planned = plan.make(survey.Survey((obj,), size, False, 1, (1, 0)), Options())
    closed = segments[2]
    (move,) = planned.moves
    assert all(r.end <= closed.start or closed.end <= r.start for r in move.image)
    assert any(p.start <= closed.start and closed.end <= p.end for p in planned.remainders)


@pytest.mark.parametrize("flags", [0, 1])
def test_align_makes_nothing_readable(tmp_path, flags):
    """Neither execute-only code nor what has no permission at all."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc to link small libraries with")
    data = bytearray(fuzz_targets.libraries()[0])
    table, count = struct.unpack_from("=Q", data, 32)[0], struct.unpack_from("=H", data, 56)[0]
    loads = [at for at in range(table, table + 56 * count, 56) if data[at] == 1]
    wanted = 5 if flags else 4  # the code, or read-only data
    at = next(at for at in loads[1:] if data[at + 4] == wanted)
    struct.pack_into("=I", data, at + 4, flags)
    file = tmp_path / "closed.so"
    file.write_bytes(data)
    with open(file, "rb") as opened:
        found = original.read(opened.fileno())
        span = layout.best_span(found, fuzz_targets.PMD)
        with pytest.raises(original.Refused, match="readable"):
            layout.lay_out(found, span, fuzz_targets.PMD)


def test_a_section_out_of_bounds_is_a_refusal(tmp_path):
    """pyelftools seeks to where a file cannot be, which is an OSError, and was "failed"."""

    class Elsewhere(io.BytesIO):
        def seek(self, *_):
            raise OSError(errno.EINVAL, "Invalid argument")

    class Broken(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(original.Refused, match="failed its check"):
        verify.check(Elsewhere(), Elsewhere(), fuzz_targets.PMD)
    with pytest.raises(OSError, match="Input/output"):
        verify.check(Broken(), Broken(), fuzz_targets.PMD)
