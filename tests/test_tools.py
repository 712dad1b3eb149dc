"""Real tools on a primed gunicorn worker see what they see of an unprimed one. `make tools-matrix`
tries all of them on every interpreter and backing; here are the ones people use first."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from harness import aligned, outside, probes
from harness.debian_python import ARCHIVE, PACKAGE, build_pie
from harness.elves import huge_files_here
from harness.interpreters import INTERPRETERS, python_of
from harness.placement import require_executable, require_images
from harness.probes import PROBES, UNPRIMED, WORKS, Failed, NotHere, Shape, Target, cores, perf
from harness.probes.commands import gdb
from harness.probes.gdb import frames_of
from harness.probes.symbols import debug_file
from harness.process import Process, interpreter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.profiler,
    pytest.mark.skipif(
        os.geteuid() != 0 and Path("/proc/sys/kernel/yama/ptrace_scope").exists(),
        reason="tools may not attach to other processes here",
    ),
    pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler"),
]

# Uprobes are tools/matrix.py's: of an unprimed worker they are set on the machine's interpreter,
# which other tests prime meanwhile. test_image.py sets one on a library of its own.
PYTHON_LEVEL = ["py-spy dump", "pystack remote", "austin", "faulthandler"]
NATIVE = [
    "py-spy dump --native",
    "pystack remote --native",
    "gdb bt",
    "gdb symbols",
    "gdb breakpoint",
    "gcore, then gdb bt",
    "gcore, then pystack core --native",
    "perf record",
    "a C++ exception through moved frames",
    "backtrace(3)",
    "build-id and symbols of a mapping's file",
]
ALIGNED = [
    "py-spy dump --native",
    "pystack remote --native",
    "gdb bt",
    "start-stop-daemon and pidof",
]
# In memory without a name, too: what works by the loader's list, and perf by its map.
WITHOUT_PATH = [name for name in NATIVE if name.startswith(("gdb", "gcore", "a C++", "backtrace"))]

# Interpreter, way, and the tools that must see there what they see unprimed.
CASES = [
    ("shared", "image on disk",
     [*PYTHON_LEVEL, *NATIVE, "perf record, started before priming"]),
    ("shared", "image on tmpfs", ["py-spy dump", "pystack remote --native"]),
    ("shared", "memfd", [*PYTHON_LEVEL, *WITHOUT_PATH]),
    ("shared", "anonymous", [*PYTHON_LEVEL, "gdb bt"]),
    ("shared", "anonymous, perf map", ["perf record"]),
    ("static", "image on disk", [*PYTHON_LEVEL, *NATIVE]),
    ("static", "memfd", PYTHON_LEVEL),
    ("static", "anonymous", [*PYTHON_LEVEL, "gdb bt"]),
    ("PIE", "image on disk", [*PYTHON_LEVEL, *NATIVE]),
    ("PIE", "memfd", PYTHON_LEVEL),
    ("shared", "primed", ALIGNED),
    ("static", "primed", ALIGNED),
]  # fmt: skip


@pytest.fixture(scope="module")
def scratch():
    """A directory on disk, and one on a tmpfs."""
    with contextlib.ExitStack() as stack:
        directories = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="page-primer-", dir=place))
            for place in ("/var/tmp", "/dev/shm")
        ]
        stack.callback(shutil.rmtree, perf.BUILD_IDS, ignore_errors=True)
        disk, memory = map(Path, directories)
        probes.build_module(disk)
        yield disk, memory


@pytest.fixture(scope="module")
def targets(scratch):
    """target(form, way, late): a server, started once."""
    disk, memory = scratch
    ways = {way.name: way for way in [UNPRIMED, *probes.ways(disk / "images", memory / "images")]}
    running = {}

    def target(form, way, late=False):
        key = form, way, late
        if way.startswith("image"):
            require_images()
        if way == "image on tmpfs":
            require_executable("/dev/shm")
        if key not in running:
            what = shape(form, disk)
            if ways[way].aligned:
                what = replace(what, aligned=twin_of(what, disk / f"aligned-{form}"))
            made = stack.enter_context(Target(what, ways[way], disk, late=late))
            attainable = outside.text_of(made.pid).attainable
            if attainable and way != UNPRIMED.name and not late:
                made.require_primed()
            running[key] = made if attainable else None
        if running[key] is None:
            pytest.skip("no whole huge page at this random load address")
        return running[key]

    with contextlib.ExitStack() as stack:
        yield target


def shape(form, directory):
    """An interpreter of a form: the one that runs the tests, or Debian's, or built from its."""
    debian = next((path for path in INTERPRETERS.values() if path.startswith("/usr/bin/")), None)
    if form == "shared":
        return Shape(form, sys.executable)
    if debian is None or (form == "PIE" and not ARCHIVE.exists()):
        pytest.skip(f"no {form} interpreter here, nor {PACKAGE} to build one from")
    home = directory / form
    home.mkdir(exist_ok=True)
    python = python_of(home, debian)
    if form == "PIE" and os.path.islink(python):
        build_pie(Path(python))
    return Shape(form, python)


def twin_of(what, directory):
    directory.mkdir(exist_ok=True)
    if reason := huge_files_here(directory):
        pytest.skip(reason)
    found = aligned.copy_of(what.python, directory)
    return replace(what, python=found.python, env=found.env)


# From which Python on a tool of today fails, primed or not.
UNKNOWN_TO_TOOLS = {"austin": (3, 14)}


@pytest.fixture(scope="module")
def unprimed(targets):
    """What a tool sees of an unprimed worker; asked once."""
    seen = {}

    def look(form, name):
        if (form, name) not in seen:
            try:
                seen[form, name] = PROBES[name].look(
                    targets(form, UNPRIMED.name, PROBES[name].late)
                )
            except NotHere as reason:
                seen[form, name] = reason
            except Failed as reason:
                if name not in UNKNOWN_TO_TOOLS or sys.version_info < UNKNOWN_TO_TOOLS[name]:
                    raise
                seen[form, name] = NotHere(f"{name} does not know this Python: {reason}")
        if isinstance(seen[form, name], NotHere):
            pytest.skip(str(seen[form, name]))
        return seen[form, name]

    return look


@pytest.mark.parametrize(
    ("form", "way", "name"),
    [(form, way, name) for form, way, names in CASES for name in names],
)
def test_the_tool_sees_what_it_sees_unprimed(targets, unprimed, form, way, name):
    expected = unprimed(form, name)
    target = targets(form, way, PROBES[name].late)
    seen = PROBES[name].look(target)
    verdict = PROBES[name].judge(expected, seen)
    if (
        verdict.mark != WORKS
        and name == "pystack remote --native"
        and debug_file(f"/proc/{target.pid}/exe")
    ):
        pytest.skip(
            "debug information by build-id (a -dbg package): pystack has it of the file alone"
        )
    assert verdict.mark == WORKS, (verdict, expected, seen)


@pytest.mark.parametrize(
    ("form", "way"),
    [("static", "image on disk"), ("shared", "image on disk")],
)
def test_a_core_file_without_its_image(targets, unprimed, scratch, form, way):
    """The missing image is named, and there are full frames: by the objects' own files."""
    target = targets(form, way)
    core = str(cores.core_of(target))
    image = target.interpreter_image
    folder = Path(image).parent
    exe = os.readlink(f"/proc/{target.pid}/exe")
    folder.rename(scratch[0] / "gone")
    try:
        said = gdb("bt", target=[exe, core])
        frames = frames_of(said)
    finally:
        (scratch[0] / "gone").rename(folder)
    # A newer gdb (18) finds the program's build-id in code that the core file has, as it has all of
    # a mapping in which a breakpoint was, and takes the program without a word.
    first = subprocess.run(["gdb", "--version"], capture_output=True, text=True, check=True).stdout
    knows = int(re.search(r" (\d+)\.\d", first.partition("\n")[0])[1]) > 16
    assert f"Can't open file {image}" in said or (knows and image not in said), said
    expected = unprimed(form, "gcore, then gdb bt")
    assert [frame.name for frame in frames] == [frame.name for frame in expected]


def test_a_perf_map_is_written_when_asked_for(python):
    with Process(python) as process:
        path = Path(f"/tmp/perf-{process.pid}.map")
        process.prime(backing="memfd", keep_profilers=False)
        assert not path.exists()
        process.restore()
        report = process.prime(backing="memfd", keep_profilers=False, perf_map=True)
        assert report["perf_map"] == str(path)
        try:
            core = interpreter(report)
            moved = [
                vma
                for vma in outside.smaps(process.pid)
                if vma.path.startswith("/memfd:page-primer")
            ]
            lines = [line.split(maxsplit=2) for line in path.read_text().splitlines()]
            assert path.stat().st_mode & 0o777 == 0o600
            for start, size, _ in lines:
                assert any(v.start <= int(start, 16) < v.end for v in moved) and int(size, 16)
            table = perf.Symbols(process.pid)
            assert all(name.partition("@")[0] in table.at(int(at, 16)) for at, _, name in lines)
            assert {"_PyEval_EvalFrameDefault", "PyList_Sort"} <= {name for _, _, name in lines}
            assert core["backing"] == "memfd"
            # A child has a number of its own, and so a file of its own.
            child = process.run(
                "import os\npid = os.fork()\n"
                "if not pid:\n    os._exit(page_primer.prime(backing='memfd', "
                "keep_profilers=False, perf_map=True).perf_map is None)\n"
                "result = pid, os.waitpid(pid, 0)[1]"
            )
            of_child = Path(f"/tmp/perf-{child[0]}.map")
            assert child[1] == 0 and of_child.read_text() == path.read_text()
            of_child.unlink()
        finally:
            path.unlink()


@pytest.mark.parametrize("there", ["symlink", "hard link", "directory", "of others", "stale"])
def test_a_perf_map_harms_no_file_that_is_there(python, tmp_path, there):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    with Process(python) as process:
        path = Path(f"/tmp/perf-{process.pid}.map")
        if there == "symlink":
            path.symlink_to(victim)
        elif there == "hard link":
            try:
                path.hardlink_to(victim)
            except OSError:
                pytest.skip("/tmp is another file system")
        elif there == "directory":
            path.mkdir()
        else:
            path.write_text("0 1 earlier\n")
            path.chmod(0o666 if there == "of others" else 0o600)
        try:
            report = process.prime(backing="memfd", keep_profilers=False, perf_map=True)
            assert interpreter(report)["backing"] == "memfd"
            assert victim.read_text() == "precious"
            if there == "stale":
                assert report["perf_map"] == str(path) and "earlier" not in path.read_text()
            else:
                assert report["perf_map"].startswith("not written: "), report["perf_map"]
        finally:
            path.rmdir() if there == "directory" else path.unlink()


def test_a_perf_map_is_added_to_cpythons_own(tmp_path):
    """CPython 3.12 and newer with -X perf writes one for Python's functions."""
    versions = {tuple(map(int, name.partition("-")[0].split("."))): name for name in INTERPRETERS}
    if max(versions) < (3, 12):
        pytest.skip("no CPython 3.12 or newer here")
    python = python_of(tmp_path, INTERPRETERS[versions[max(versions)]])
    with Process(python, options=["-X", "perf"]) as process:
        path = Path(f"/tmp/perf-{process.pid}.map")
        try:
            process.prime(backing="memfd", keep_profilers=False, perf_map=True)
            text = path.read_text()
            assert "py::" in text and "PyList_Sort" in text
        finally:
            path.unlink()


@pytest.mark.images
def test_debug_information_is_left_out_where_there_is_no_room(python, images):
    """An image must not fill a small file system for the sake of source lines."""
    sizes = []
    for limit in ("unlimited", str(24 << 20)):
        done = subprocess.run(
            ["prlimit", f"--fsize={limit}", python, "-c",
             "import page_primer; r = page_primer.prime(backing='image', mlock=False, "
             f"image_dir={str(images / limit)!r}); print(r.interpreter.where)"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        with open(done.stdout.strip(), "rb") as file:
            elf = ELFFile(file)
            assert elf.get_section_by_name(".dynsym")
            sizes.append(bool(elf.get_section_by_name(".debug_info")))
    with open(outside.interpreter_file(os.getpid()), "rb") as file:
        has_any = bool(ELFFile(file).get_section_by_name(".debug_info"))
    assert sizes == [has_any, False]
