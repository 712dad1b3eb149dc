"""What a host and its environment may do to prime(), at any moment."""

import os
import shutil
import subprocess
import sys
import textwrap
from functools import lru_cache
from pathlib import Path

import pytest
from harness import outside
from harness.faults import build_fault
from harness.interpreters import INTERPRETERS, python_of
from harness.kernel import filesystem, require_huge_files
from harness.libraries import build_library
from harness.placement import require_images
from harness.privileges import BACKING, locks_fit
from harness.process import Process, interpreter, left_of

ROOT = Path(__file__).parents[1]
MIB = 1 << 20


def headers():
    """Include directories of the CPythons here, by version."""
    found = {}
    for path in INTERPRETERS.values():
        source = "import sys, sysconfig; print(sys.version_info[1], sysconfig.get_path('include'))"
        minor, include = subprocess.run(
            [path, "-I", "-c", source], capture_output=True, text=True, check=True
        ).stdout.split()
        if Path(include, "Python.h").exists():
            found.setdefault(minor, include)
    return found


HEADERS = headers()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """built(minor): the directory of a copy of the package whose core was built with one version's
    headers; built once."""
    return lru_cache(lambda minor: build(HEADERS[minor], tmp_path_factory.mktemp("built")))


def build(include, directory):
    package = directory / "page_primer"
    subprocess.run(["cp", "-r", str(ROOT / "page_primer"), str(package)], check=True)
    for core in package.glob("_core*.so"):
        core.unlink()
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-std=gnu11", "-O1", f"-I{include}",
         *map(str, package.glob("_*.c")), "-o", str(package / "_core.abi3.so")], check=True,
    )  # fmt: skip
    return str(directory)


@pytest.mark.slow
@pytest.mark.parametrize("minor", list(HEADERS), ids=lambda minor: f"headers-3.{minor}")
def test_one_build_serves_every_version(built, minor, every_python, images):
    """The stable ABI is a promise of headers, and some of its macros change under it."""
    package_built_with = built(minor)
    source = f"""
        import sys; sys.path.insert(0, {package_built_with!r})
        import page_primer, page_primer._core
        assert page_primer.__file__.startswith({package_built_with!r})
        for _ in range(40):
            report = page_primer.prime(image_dir={str(images)!r})
            assert report.reason is None and report.interpreter.code_huge_bytes, str(report)
            page_primer.restore()
        print("fine")
    """
    done = subprocess.run(
        [every_python, "-c", textwrap.dedent(source)], capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


@pytest.mark.slow
def test_the_core_compiles_for_free_threading(tmp_path):
    """Such a build says what it is in its pyconfig.h, and has no stable ABI before 3.15."""
    minor = max(HEADERS, key=int, default="0")
    if int(minor) < 13:
        pytest.skip("no headers of CPython 3.13 or newer here")
    include = tmp_path / "include"
    shutil.copytree(HEADERS[minor], include)
    with open(include / "pyconfig.h", "a") as file:
        file.write("\n#define Py_GIL_DISABLED 1\n")
    command = ["gcc", "-std=gnu11", "-Wall", "-Werror", "-fsyntax-only", f"-I{include}"]
    subprocess.run([*command, *map(str, (ROOT / "page_primer").glob("_*.c"))], check=True)


@pytest.mark.parametrize("backing", ["image", "memfd"])
def test_file_size_limit_with_its_signal_on(python, images, backing):
    """SIGXFSZ, which CPython ignores and a host that embeds it may not."""
    if backing == "image":
        require_images()
    source = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        import page_primer
        result = page_primer.prime(
            backing={backing!r}, image_dir={str(images)!r}, keep_profilers=False).as_dict()
    """
    with Process(python) as process:
        core = interpreter(process.run(textwrap.dedent(source)))
        assert core["backing"] is None
        assert any("File too large" in note for note in core["notes"])


@pytest.mark.slow
def test_interrupts_at_any_moment_lose_nothing(python, images):
    """Ctrl-C in the midst of prime(): afterwards restore() puts everything back."""
    source = f"""
        import os, signal, time, page_primer, page_primer.apply.process
        class Stop(BaseException): pass
        def stop(*_): raise Stop
        signal.signal(signal.SIGALRM, stop)
        page_primer.prime(image_dir={str(images)!r}); page_primer.restore()
        interrupted = 0
        left = []
        for n in range(120):
            try:  # the alarm may come as late as it is cancelled
                signal.setitimer(signal.ITIMER_REAL, 0.0004 + n * 0.00015)
                try:
                    page_primer.prime(image_dir={str(images)!r})
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Stop:
                interrupted += 1
            report = page_primer.restore()
            # What was being prepared may be left mapped elsewhere; nothing of it over code.
            objects = [(o.segments[0].start, o.segments[-1].end) for o in report.objects]
            for line in open("/proc/self/maps"):
                at = int(line.split("-")[0], 16)
                if {str(images)!r} in line and any(low <= at < high for low, high in objects):
                    left.append(line)
        result = [interrupted, left]
    """
    require_huge_files(images.parent)
    with Process(python) as process:
        interrupted, left = process.run(textwrap.dedent(source))
        assert interrupted > 5
        assert left == []


@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unforeseen_failure_around_the_swap(python, images, error, when):
    """Whatever happens there, the book says what is so: the next call does what is left to do."""
    source = f"""
        import page_primer, page_primer.apply.process, page_primer.apply.swap as move
        swap_in = move._swap_in
        # As if it were a line of the package: what the host's own code raises is for the host.
        exec(compile('''def fails(*given):
            if {when!r} == "after":
                swap_in(*given)
            raise {error}''', move.__file__, "exec"))
        move._swap_in = fails
        try:
            page_primer.prime(image_dir={str(images)!r})
        except KeyboardInterrupt:
            pass
        move._swap_in = swap_in
        page_primer.apply.process.process.loads = (0, 0)
        first = page_primer.prime(image_dir={str(images)!r})
        result = [first.as_dict(), page_primer.restore().as_dict()]
    """
    require_huge_files(images.parent)
    with Process(python) as process:
        before = outside.file_mappings(process.pid)
        first, last = process.run(textwrap.dedent(source))
        assert interpreter(first)["backing"] == BACKING
        assert interpreter(first)["code_huge_bytes"] > 0
        assert interpreter(last)["code_huge_bytes"] == 0
        assert [m for m in before if m not in outside.file_mappings(process.pid)] == []


def test_an_object_without_writable_data(python, images, tmp_path):
    """Nothing of it stays on its own file, so only the book knows that it was moved."""
    library = build_library(tmp_path, "libbig.so")
    source = f"""
        import ctypes, page_primer, page_primer.apply.process, page_primer.survey as survey
        from page_primer import reasons
        lib = ctypes.CDLL({str(library)!r})
        take = survey.take
        def without_data(*read):  # a survey that cannot tell by the writable segment's file
            found = take(*read)
            objects = tuple(
                survey.replace(o, problem=None)
                if o.path == {str(library)!r} and o.problem == reasons.REMAPPED else o
                for o in found.objects)
            return survey.replace(found, objects=objects)
        survey.take = without_data
        first = page_primer.prime(image_dir={str(images)!r})
        page_primer.apply.process.process.loads = (0, 0)
        again = page_primer.prime(image_dir={str(images)!r})
        result = [first.reason, again.reason, {str(library)!r} in first.moved, list(again.moved),
                  lib.answer()]
    """
    with Process(python) as process:
        assert process.run(textwrap.dedent(source)) == [None, None, True, [], 42]
        process.restore()
        assert not any(str(images) in v.path for v in outside.smaps(process.pid))


def test_locks_of_the_host_are_kept(python, images):
    """A host that called mlockall() has everything locked, before, while and after."""

    def unlocked(process):
        return [
            v.path for v in outside.smaps(process.pid)
            if v.path.startswith("/") and "lo" not in v.flags and v.perms != "---p"
            and "-anchor/" not in v.path  # a page for tools, which the process never reads
        ]  # fmt: skip

    for mlock in (True, False):
        with Process(python) as process:
            process.run("import page_primer.apply.process, random, ctypes")
            if process.run("result = ctypes.CDLL(None).mlockall(1)"):
                pytest.skip("mlockall() is not allowed here")
            assert unlocked(process) == []
            process.prime(image_dir=str(images), mlock=mlock)
            text = outside.text_of(process.pid)
            assert text.huge == text.attainable
            assert [path for path in unlocked(process) if "python" in path] == []
            process.restore()
            assert [path for path in unlocked(process) if "python" in path] == []


HOST_LOCKS = """
import ctypes, os, random, page_primer
from page_primer import _core
libc = ctypes.CDLL(None, use_errno=True)
path = {path!r}
code, start = [], 0
for line in open("/proc/self/maps"):
    fields = line.split()
    if fields[-1] == path and fields[1] == "r-xp":
        code = [int(end, 16) for end in fields[0].split("-")]
start, end = code
def call(name, begin, length):
    if getattr(libc, name)(ctypes.c_void_p(begin), ctypes.c_size_t(length)):
        raise OSError(ctypes.get_errno(), name)
call("mlock", start, end - start)
result = start, end
"""


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("mlock", [False, True])
def test_locks_that_the_host_gives_up_are_gone(python, images, mlock, more):
    """Also those of a part of what it had locked; the rest is its own for ever."""
    options = {"image_dir": str(images), "mlock": mlock}
    with Process(python) as process:

        def locked():
            return [
                (max(v.start, start), min(v.end, end)) for v in outside.smaps(process.pid)
                if v.start < end and v.end > start and "lo" in v.flags
            ]  # fmt: skip

        path = next(o for o in process.prime(**options)["objects"] if o["interpreter"])["path"]
        process.restore()
        start, end = process.run(HOST_LOCKS.format(path=path))
        half = start + ((end - start) // 2 & -4096)
        process.prime(**options)
        assert sum(b - a for a, b in locked()) == end - start
        process.run(f"call('munlock', {half}, {end - half})")
        if more:  # a full call, that sees what the host has given up, and may lock it itself
            process.run("import _decimal, _ctypes_test")
            process.prime(**options)
        process.restore()
        assert sum(b - a for a, b in locked()) == half - start
        assert max(b for _, b in locked()) == half


def test_a_failed_call_does_not_spoil_the_next(python, images, tmp_path):
    library = build_library(tmp_path, "libbig.so")
    source = f"""
        import ctypes, errno, page_primer, page_primer.apply.process as apply
        page_primer.prime(image_dir={str(images)!r})
        ctypes.CDLL({str(library)!r})
        read = apply.smaps.read_maps
        fails = "def fails(*_): raise OSError(errno.EMFILE, 'Too many open files')"
        exec(compile(fails, apply.__file__, "exec"))
        apply.smaps.read_maps = fails
        first = page_primer.prime(image_dir={str(images)!r}).summary()
        apply.smaps.read_maps = read
        result = [first, page_primer.prime(image_dir={str(images)!r}).as_dict()]
    """
    with Process(python) as process:
        reason, report = process.run(textwrap.dedent(source))
        assert "Too many open files" in reason
        (big,) = [obj for obj in report["objects"] if obj["path"] == str(library)]
        assert big["backing"] == BACKING
        assert big["locked_bytes"] > 0 or not locks_fit()


@pytest.mark.slow
def test_a_file_replaced_after_priming_is_not_forgotten(python, images, tmp_path):
    """An upgrade of the package in place, and then another library: the old code runs on from the
    image, and the report and the image's lock must still know it."""
    library = build_library(tmp_path, "libbig.so")
    other = build_library(tmp_path, "libother.so")
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        process.prime(image_dir=str(images))
        library.rename(tmp_path / "old.so")
        build_library(tmp_path, "libbig.so")
        process.run(f"ctypes.CDLL({str(other)!r})")
        report = process.prime(image_dir=str(images))
        assert report["moved"] == [str(other)]
        (big,) = [obj for obj in report["objects"] if obj["path"] == str(library)]
        assert big["backing"] == BACKING
        assert big["code_huge_bytes"] > 0
        assert "already remapped" not in left_of(report, "libbig.so")
        # Its own file is not at its path any more, so it cannot be put back, and it is said.
        restored = process.restore()
        notes = [note for obj in restored["objects"] for note in obj["notes"]]
        assert any("file deleted or replaced on disk" in note for note in notes)
        assert process.run("result = lib.answer()") == 42


def test_a_new_hard_link_is_no_new_file(python, images, tmp_path):
    library = build_library(tmp_path, "libbig.so")
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        process.prime(image_dir=str(images))
        os.link(library, tmp_path / "link")
        process.restore()
        assert not any(str(images) in v.path for v in outside.smaps(process.pid))
        assert process.run("result = lib.answer()") == 42


def test_the_file_is_replaced_in_the_midst_of_a_failing_swap(python, images, tmp_path):
    """To undo, the object's own file is mapped again, and nothing else."""
    fault = build_fault(tmp_path)
    library = build_library(tmp_path, "libbig.so")
    wrong = tmp_path / "wrong.so"
    subprocess.run(["cp", "/bin/true", str(wrong)], check=True)
    source = f"""
        import ctypes, os, page_primer, page_primer.apply.swap as move
        lib = ctypes.CDLL({str(library)!r})
        fault = ctypes.CDLL(None)
        swap_in = move._swap_in
        def replaced(obj, *rest):
            if obj.path == {str(library)!r}:
                os.rename({str(wrong)!r}, obj.path)
                fault.fault_arm(b"mmap", 2, 12)
            return swap_in(obj, *rest)
        move._swap_in = replaced
        page_primer.prime(image_dir={str(images)!r})
        fault.fault_fired()
        result = lib.answer()
    """
    with Process(python, env={"LD_PRELOAD": fault}) as process:
        assert process.run(textwrap.dedent(source)) == 42


@pytest.mark.images
def test_no_descriptors_are_left_open(python, images, tmp_path):
    with Process(python) as process:
        process.run("import page_primer.apply.process, random, os")
        process.prime(image_dir=str(images))
        process.restore()
        count = "result = len(os.listdir('/proc/self/fd'))"
        before = process.run(count)
        for backing in ("image", "memfd", "anonymous", "hugetlb"):
            for _ in range(5):
                process.prime(image_dir=str(images), backing=backing, keep_profilers=False)
                process.restore()
        assert process.run(count) == before
        # One for each image and each anchor in use: the lock.
        report = process.prime(image_dir=str(images))
        moved = sum(obj["backing"] == "image" for obj in report["objects"])
        mapped = {v.path for v in outside.smaps(process.pid) if v.path.startswith(str(images))}
        used = {os.path.dirname(path) for path in mapped}
        assert len([path for path in used if not path.endswith("-anchor")]) == moved > 0
        assert process.run(count) == before + len(used)


def test_a_noexec_directory_leaks_no_address_space(python, tmp_path):
    (tmp_path / "mounted").mkdir()
    script = f'mount -t tmpfs -o noexec none {tmp_path}/mounted && exec "$@"'
    wrapper = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    with Process(python, wrapper=wrapper) as process:

        def empty():
            return len([v for v in outside.smaps(process.pid) if v.perms == "---p" and not v.path])

        options = {"image_dir": f"{tmp_path}/mounted/images", "backing": "image"}
        process.prime(**options)
        process.restore()
        before = empty()
        for _ in range(5):
            process.prime(**options)
            process.restore()
        assert empty() == before


@pytest.mark.parametrize("name", ["sp ace.so", "nl\nname.so", "tab\t.so", "ümlaut.so"])
def test_odd_names(python, images, tmp_path, name):
    library = build_library(tmp_path, "plain.so")
    odd = tmp_path / name
    library.rename(odd)
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(odd)!r})")
        report = process.prime(image_dir=str(images))
        assert str(odd) in report["moved"]
        assert process.run("result = lib.answer()") == 42
        process.restore()


def test_a_path_that_the_locale_cannot_say(python, images, tmp_path):
    library = build_library(tmp_path, "plain.so")
    odd = tmp_path / "ümlaut.so"
    library.rename(odd)
    env = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    with Process(python, env=env) as process:
        process.run(
            f"import ctypes, os; p = os.fsdecode({os.fsencode(str(odd))!r}); lib = ctypes.CDLL(p)"
        )
        source = f"import page_primer; r = page_primer.prime(image_dir={str(images)!r})\n"
        assert process.run(source + "result = [r.reason, p in r.moved]") == [None, True]


def test_without_memfd_create_in_os(python, images):
    """Pythons built for an old C library have none."""
    with Process(python) as process:
        process.run("import os; del os.memfd_create")
        core = interpreter(process.prime(backing="memfd", keep_profilers=False))
        assert core["backing"] == "memfd"


@pytest.mark.slow
def test_random_load_addresses_on_overlayfs(tmp_path):
    """Most containers: an address of any phase. What whole huge pages cover is huge, the edges are
    not, py-spy's arithmetic holds, and images of other phases are pruned."""
    shared = [p for p in INTERPRETERS.values() if "pyenv" in p or "local" in p]
    if not shared:
        pytest.skip("no interpreter with a shared libpython in a tree of its own")
    prefix = Path(os.path.realpath(shared[-1])).parents[1]
    (tmp_path / "layers").mkdir()
    mount = (
        f"cd {tmp_path}/layers && mount -t tmpfs none $PWD && cd $PWD && "
        "mkdir $PWD/up $PWD/scratch && mount -t overlay overlay -o "
        f"lowerdir={prefix},upperdir=$PWD/up,workdir=$PWD/scratch {prefix}"
    )
    wrapper = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    if filesystem(prefix) == "overlayfs":  # on another, files would have no path in maps
        wrapper = []
    elif subprocess.run([*wrapper, "true"], capture_output=True).returncode:
        pytest.skip("mounting an overlay is not allowed here")
    python = python_of(tmp_path, shared[-1])
    images = tmp_path / "images"
    phases = set()
    for _ in range(8):
        with Process(python, wrapper=wrapper) as process:
            before = outside.file_mappings(process.pid)
            path = next(m[4] for m in before if "libpython" in m[4])
            report = process.prime(image_dir=str(images))
            core = interpreter(report)
            assert core["path"] == path
            phases.add(core["segments"][0]["start"] % outside.PMD)
            text = outside.text_of(process.pid, path)
            assert text.huge == text.attainable, core["notes"]
            if text.huge:
                dump = subprocess.run(
                    [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid",
                     str(process.pid)], capture_output=True, text=True,
                )  # fmt: skip
                assert "driver.py" in dump.stdout, dump.stderr
            process.restore()
            assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
    assert len(phases) > 1
    assert len(list(images.glob("*/libpython*"))) <= 5
