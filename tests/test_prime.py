"""prime() and restore() in real processes, checked from outside in smaps."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from pathlib import Path

import pytest
from harness import outside
from harness.debian_python import ARCHIVE, DEBIAN, PACKAGE, build_pie
from harness.interpreters import KINDS, python_of
from harness.kernel import require_huge_files
from harness.libraries import BIG, build, build_library, chunks_library
from harness.outside import PMD
from harness.placement import (
    has_one_address,
    has_random_addresses,
    require_executable,
    require_images,
    require_one_address,
)
from harness.privileges import BACKING, drop_memlock, has_images
from harness.process import Failed, Process, interpreter, left_of

import page_primer
from page_primer.kernel import memlock
from page_primer.reasons import OVER_PRIVATE_LIMIT
from page_primer.words import memlock_for

MIB = 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def image_dir(request, images):
    if request.param == "disk":
        require_huge_files(images.parent)
        yield str(images)
        return
    require_huge_files("/dev/shm")
    require_executable("/dev/shm")
    path = Path(f"/dev/shm/page-primer-test-{os.getpid()}")
    yield str(path)
    subprocess.run(["rm", "-rf", str(path)], check=True)


def check_all_huge(pid):
    text = outside.text_of(pid)
    text.require_huge()
    if text.attainable == text.size:
        assert text.executable
    return text


@pytest.mark.images
def test_image_puts_all_attainable_text_on_huge_pages(every_python, image_dir):
    with Process(every_python) as process:
        before = outside.file_mappings(process.pid)
        report = process.prime(image_dir=image_dir)
        text = check_all_huge(process.pid)
        core = interpreter(report)
        if text.attainable:
            assert core["backing"] == "image"
            assert core["where"].startswith(image_dir + "/")
            assert os.path.basename(core["where"]) == os.path.basename(core["path"])
            # The whole read-only span is the image's: a profiler sees one file, and only one.
            assert {v.path for v in text.span_vmas} == {core["where"]}
        assert report["locked_bytes"] > core["code_bytes"]
        assert text.locked

        process.restore()
        imported = process.run("import sys, json; result = len(sys.modules)")
        assert imported
        after = outside.file_mappings(process.pid)
        assert [m for m in before if m not in after] == []
        assert not any(image_dir in m[4] for m in after)
        assert not any("lo" in v.flags for v in outside.smaps(process.pid))


@pytest.mark.images
def test_no_copy_of_the_interpreter_is_needed_twice(python, images):
    """A second process maps the image that the first one wrote."""
    require_huge_files(images.parent)
    require_one_address(python)
    with Process(python) as one, Process(python) as two:
        first = interpreter(one.prime(image_dir=str(images)))
        second = interpreter(two.prime(image_dir=str(images)))
        assert first["written_bytes"] > first["code_bytes"]
        assert (second["where"], second["written_bytes"]) == (first["where"], 0)
        texts = check_all_huge(one.pid), check_all_huge(two.pid)
        assert sum(t.pss for t in texts) == pytest.approx(texts[0].span, rel=0.05)


@pytest.mark.parametrize("backing", ["memfd", "anonymous"])
@pytest.mark.parametrize("keep_profilers", [True, False])
def test_memory_backings(every_python, images, backing, keep_profilers):
    with Process(every_python) as process:
        before = outside.file_mappings(process.pid)
        report = process.prime(
            backing=backing, keep_profilers=keep_profilers, image_dir=str(images)
        )
        core = interpreter(report)
        text = outside.text_of(process.pid, core["path"])
        anchored = text.fixed and has_images()
        if keep_profilers and not anchored:
            # Header and first code stay on the file; the rest is huge.
            assert any(v.path == core["path"] and "x" in v.perms for v in text.span_vmas)
            left = left_of(report, os.path.basename(core["path"]))
            # At a random address they may lie before the first whole huge page anyway.
            if not text.phase or text.huge < text.attainable:
                assert "kept for profilers" in left or "nothing is left but" in core["notes"][0]
        else:
            assert text.huge == text.attainable
        assert core["code_huge_bytes"] == pytest.approx(text.huge, abs=2 * 4096 + 0x8000)
        assert core["backing"] == (backing if text.huge else None)
        # Running code, garbage collection, imports and exceptions, on what was moved.
        assert process.run("import decimal, gc; gc.collect(); result = str(decimal.Decimal(1) / 3)")
        assert len(anchors(process, images)) == (2 if keep_profilers and anchored else 0)
        process.restore()
        after = outside.file_mappings(process.pid)
        assert [m for m in before if m not in after] == []
        assert not anchors(process, images)


def anchors(process, images):
    """The mappings of anchors in a process: address and path."""
    mapped = outside.file_mappings(process.pid)
    return [(m[0], m[4]) for m in mapped if m[4].startswith(f"{images}/") and "-anchor/" in m[4]]


@pytest.fixture
def static(tmp_path):
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    return python_of(tmp_path, KINDS["static"])


@pytest.mark.images
def test_anchors_are_shared_and_go_with_the_move(static, images):
    options = {"backing": "memfd", "image_dir": str(images)}
    with Process(static) as one, Process(static) as two:
        one.prime(**options)
        assert len(anchors(one, images)) == 2
        two.prime(**options)
        assert anchors(one, images) == anchors(two, images)
        two.restore()
        # Where an image describes the program, one is enough.
        assert interpreter(two.prime(image_dir=str(images)))["backing"] == "image"
        assert anchors(two, images) == anchors(one, images)[1:]
        # A child has them too, and again they go.
        assert (
            two.run(
                "import os\npid = os.fork()\n"
                "if not pid:\n"
                "    page_primer.restore()\n"
                "    os._exit('anchor' in open('/proc/self/maps').read())\n"
                "result = os.waitpid(pid, 0)[1]"
            )
            == 0
        )
        assert len(anchors(two, images)) == 1


@pytest.mark.images
def test_anchors_of_an_interrupted_move_go(static, images):
    """An exception of the host's, at the swap: what was put up is in the book."""
    options = {"backing": "memfd", "image_dir": str(images)}
    with Process(static) as process:
        process.run(
            "import page_primer, page_primer.apply.swap as move\n"
            "swap_in = move._swap_in\n"
            "def interrupted(*_): raise KeyboardInterrupt\n"
            "move._swap_in = interrupted\n"
            f"try: page_primer.prime(**{options!r})\n"
            "except KeyboardInterrupt: pass\n"
            "move._swap_in = swap_in"
        )
        report = process.prime(**options)
        assert interpreter(report)["notes"] == []
        check_all_huge(process.pid)
        assert len(anchors(process, images)) == 2
        process.restore()
        assert not anchors(process, images)


def test_what_took_a_anchors_place_stays(static, images):
    with Process(static) as process:
        process.prime(backing="memfd", image_dir=str(images))
        process.run(
            "import ctypes; libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p\n"
            "assert libc.mmap(ctypes.c_void_p(256 << 30), 1 << 20, 3, 0x32, -1, 0) == 256 << 30"
        )
        process.restore()
        assert process.run("result = ctypes.string_at(256 << 30, 1).hex()") == "00"


@pytest.mark.parametrize("harm", ["cut short", "zeroes"])
def test_a_broken_anchor_is_written_again(static, images, harm):
    options = {"backing": "memfd", "image_dir": str(images)}
    with Process(static) as process:
        process.prime(**options)
        paths = [Path(path) for _, path in anchors(process, images)]
        process.restore()
        sound = [path.read_bytes() for path in paths]
        for path in paths:
            path.chmod(0o755)
            path.write_bytes(sound[0][:4096] if harm == "cut short" else bytes(len(sound[0])))
        process.prime(**options)
        assert [path.read_bytes() for path in paths] == sound


@pytest.mark.images
def test_an_image_is_written_in_pieces_where_it_must_be(python, images):
    """A short write, as a signal or a disk almost full may cause."""
    with Process(python) as process:
        process.run(
            "import os; pwritev = os.pwritev\n"
            "os.pwritev = lambda fd, parts, at: pwritev(fd, [memoryview(parts[0])[:1000]], at)"
        )
        report = process.prime(image_dir=str(images))
        # Its pages are small as written; read again they are huge.
        core = interpreter(report)
        assert core["backing"] == "image"
        text = check_all_huge(process.pid)
        whole = sum(vma.huge for vma in text.span_vmas)
        assert whole >= 2 * outside.PMD or text.phase
        assert core["notes"] == [f"{core['where']}: 0 of {whole} bytes huge"]


def test_nothing_stays_mapped(every_python, images):
    """Of writing an image, and of everything else, once it is restored."""

    def unnamed():
        return [v for v in outside.smaps(process.pid) if v.perms == "---p" and not v.path]

    with Process(every_python) as process:
        process.run("import page_primer.apply.process")
        before = len(unnamed())
        process.prime(image_dir=str(images))
        assert len(unnamed()) == before
        process.restore()
        assert len(unnamed()) == before


@pytest.mark.parametrize("why", ["no directory", "no room"])
def test_without_anchors_profilers_keep_the_head(static, images, why):
    with Process(static) as process:
        if why == "no room":
            process.run(
                "import ctypes, mmap; libc = ctypes.CDLL(None); libc.mmap.restype = ctypes.c_void_p"
                "\nresult = libc.mmap(ctypes.c_void_p(256 << 30), 4096, 0, 0x100022, -1, 0)"
            )
        else:
            images.write_text("no directory")
        report = process.prime(backing="memfd", image_dir=str(images))
        core = interpreter(report)
        text = outside.text_of(process.pid, core["path"])
        assert 0 < text.huge < text.attainable
        assert "kept for profilers" in left_of(report, os.path.basename(core["path"]))
        if why == "no directory":
            assert core["notes"] == [f"no anchor: {images}: Not a directory"]
        assert not (images.is_dir() and anchors(process, images))
        images.unlink(missing_ok=True)


# The descriptors of what is mapped over code, of which prime() keeps none.
KEEP_DESCRIPTORS = """
import errno, fcntl, os
from page_primer import _core
swap, kept = _core.swap, {}
def keeping(base, headers, pieces, originals):
    for *_, fd, _ in pieces:
        if fd != -1:  # a Descriptor, which is no number
            kept.setdefault(os.fstat(fd).st_ino, os.dup(fd))
    return swap(base, headers, pieces, originals)
_core.swap = keeping

def outcome(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
"""


def test_memfd_is_sealed(python):
    """Nobody who gets hold of it (a debugger, a process that inherited it) changes its content."""
    with Process(python) as process:
        process.run(KEEP_DESCRIPTORS)
        process.prime(backing="memfd", keep_profilers=False)
        vmas = [v for v in outside.smaps(process.pid) if v.path.startswith("/memfd:")]
        assert vmas
        assert {v.perms for v in vmas} <= {"r-xp", "r--p"}
        get, add, all_of_them = 1034, 1033, 0x1 | 0x2 | 0x4 | 0x8  # linux/fcntl.h
        seals = process.run(f"result = {{i: fcntl.fcntl(fd, {get}) for i, fd in kept.items()}}")
        assert set(map(int, seals)) == {v.inode for v in vmas}
        assert {found & all_of_them for found in seals.values()} == {all_of_them}
        changes = process.run(
            "calls = (os.pwrite, b'x', 0), (os.ftruncate, 1), (os.ftruncate, 1 << 30), "
            f"(fcntl.fcntl, {add}, 0)\n"
            "result = [outcome(call, fd, *rest) for fd in kept.values() for call, *rest in calls]"
        )
        assert set(changes) == {"EPERM"}


def test_second_call_does_nothing_and_a_new_library_is_handled(python, images):
    with Process(python) as process:
        process.run("import page_primer")
        process.prime(image_dir=str(images))
        assert process.prime(image_dir=str(images))["moved"] == []
        again = process.prime(image_dir=str(images))
        assert again["moved"] == []
        process.run("import hashlib, ssl")  # libcrypto
        report = process.prime(image_dir=str(images))
        names = [os.path.basename(path) for path in report["moved"]]
        if not any(name.startswith("libcrypto") for name in names):
            pytest.skip("this interpreter has no libcrypto of its own to load")
        path = next(p for p in report["moved"] if os.path.basename(p).startswith("libcrypto"))
        text = outside.text_of(process.pid, path)
        assert text.moved, text
        text.require_libcrypto_moved()
        process.run("result = hashlib.sha256(b'x').hexdigest()")


def test_child_locks_again(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        child = process.run(
            textwrap.dedent("""
            import os, signal
            ready, told = os.pipe()
            child = os.fork()
            if child == 0:
                report = page_primer.prime(image_dir=%r)
                os.write(told, f"{report.pid} {report.locked_bytes}".encode())
                signal.pause()
            answer = os.read(ready, 100).split()
            assert int(answer[0]) == child
            result = [child, int(answer[1])]
            """)
            % str(images)
        )
        try:
            text = check_all_huge(child[0])
            assert text.locked
            assert child[1] == process.run("result = report.locked_bytes")
            parent = [v.file_mapping for v in outside.smaps(process.pid) if "lo" in v.flags]
            locked = [v.file_mapping for v in outside.smaps(child[0]) if "lo" in v.flags]
            assert [m for m in parent if m[4].startswith("/") and m not in locked] == []
        finally:
            process.run(f"os.kill({child[0]}, 9); os.waitpid({child[0]}, 0)")


@pytest.mark.slow
def test_threads_run_through_the_swap(python, images):
    """Threads execute interpreter code while it is swapped back and forth."""
    source = """
        import threading, json, sys, time, re
        sys.setswitchinterval(0.0002)  # more turns a swap, and shorter waits for this thread's
        stop = threading.Event()
        done = []
        def work():
            n = 0
            while not stop.is_set():
                assert json.loads(json.dumps({"a": [1, 2.5, None]}))["a"][1] == 2.5
                assert re.sub("a+", "b", "aaac") == "bc"
                n += 1
            done.append(n)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads: thread.start()
        import page_primer
        for backing in [%r, "memfd", "anonymous"] * 15:
            report = page_primer.prime(backing=backing, image_dir=%r, keep_profilers=False)
            assert report.interpreter.code_huge_bytes, str(report)
            page_primer.restore()
        stop.set()
        for thread in threads: thread.join()
        result = [len(done), min(done), report.threads]
    """
    require_huge_files(images.parent)
    with Process(python) as process:
        threads, fewest, seen = process.run(textwrap.dedent(source) % (BACKING, str(images)))
        assert (threads, seen) == (4, 5)
        assert fewest > 0


def test_default_memlock_locks_the_interpreter_first_and_tells_the_rest(every_python, images):
    with Process(every_python, wrapper=drop_memlock(8 * MIB)) as process:
        process.run("import ssl, decimal, sqlite3")
        report = process.prime(image_dir=str(images), mlock=True)
        text = outside.text_of(process.pid)
        assert text.locked
        assert report["lock_limit"] == 8 * MIB
        assert report["lock_refused_bytes"] > 0
        locked = sum(v.end - v.start for v in outside.smaps(process.pid) if "lo" in v.flags)
        assert 4 * MIB < locked <= 7 * MIB, "an eighth of the limit is left to the host"
        assert "over RLIMIT_MEMLOCK" in report["lock_refusal"]
        lines = process.run(
            "import logging\n"
            "class Keep(logging.Handler):\n"
            "    def emit(self, record): lines.append([record.levelname, record.getMessage()])\n"
            "lines, logger = [], logging.getLogger('test')\n"
            "logger.addHandler(Keep()); logger.setLevel(logging.DEBUG); logger.propagate = False\n"
            "report.log(logger); result = lines"
        )
        warnings = [line for level, line in lines if level == "WARNING"]
        # At a random address less of the interpreter than could be may be huge, too.
        # So it is where a part stays on the file, and the directory that was named is not used.
        assert len(warnings) == 1 or not has_one_address(every_python) or not has_images(), warnings
        (warning,) = [line for line in warnings if "not locked" in line]
        assert "RLIMIT_MEMLOCK is 8.0 MiB" in warning
        assert "LimitMEMLOCK=" in warning
        assert "--ulimit memlock=" in warning
        assert "over RLIMIT_MEMLOCK" in warning
        # The remedy in the line is enough.
        limit = int(warning.split("--ulimit memlock=")[1].split()[0])
        assert limit == memlock_for(report["lock_wanted_bytes"])
        assert report["lock_wanted_bytes"] <= limit - memlock.margin(limit)


def test_the_host_can_lock_something_itself(python, images):
    """A part of RLIMIT_MEMLOCK is left to it, however much there is to be locked."""
    with Process(python, wrapper=drop_memlock(8 * MIB)) as process:
        process.run("import ssl, decimal, sqlite3, ctypes, mmap")
        assert process.prime(image_dir=str(images))["lock_refused_bytes"] > 0
        result = process.run(
            "key = mmap.mmap(-1, 512 << 10)\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "at = ctypes.addressof(ctypes.c_char.from_buffer(key))\n"
            "result = libc.mlock(ctypes.c_void_p(at), ctypes.c_size_t(512 << 10))"
        )
        assert result == 0


def test_locking_libraries_makes_nothing_resident(python, images):
    """What is not the interpreter is locked as it is touched."""
    with Process(python) as process:
        process.run("import page_primer.apply.process, ssl, sqlite3")

        def resident():
            return {
                (v.start, v.end): v.kb["Rss"]
                for v in outside.smaps(process.pid)
                if "/libcrypto" in v.path or "/libsqlite3" in v.path or "/libc.so" in v.path
            }

        before = resident()
        report = process.prime(remap=False)
        if report["lock_refused_bytes"]:
            pytest.skip("RLIMIT_MEMLOCK holds here: neither CAP_IPC_LOCK nor room enough")
        after = resident()
        assert len(after) >= 6
        assert after.keys() == before.keys()
        # What priming itself runs of them is not much.
        assert sum(after.values()) - sum(before.values()) <= 512
        whole = sum(end - start for start, end in after) >> 10
        assert sum(before.values()) < whole - 1024
        for vma in outside.smaps(process.pid):
            if (vma.start, vma.end) in after and vma.perms[0] == "r":
                assert "lo" in vma.flags, vma


def test_no_memlock_at_all_is_an_outcome(python, images):
    with Process(python, wrapper=drop_memlock(0)) as process:
        report = process.prime(image_dir=str(images))
        assert report["locked_bytes"] == 0
        assert report["lock_limit"] == 0
        assert report["lock_refusal"] == "over RLIMIT_MEMLOCK"
        check_all_huge(process.pid)


def test_unlimited_memlock_locks_everything(python, images):
    with Process(python) as process:
        report = process.prime(image_dir=str(images))
        if report["lock_refused_bytes"]:
            pytest.skip("RLIMIT_MEMLOCK holds here: neither CAP_IPC_LOCK nor room enough")
        vmas = outside.smaps(process.pid)
        for vma in vmas:
            # Every mapping of an ELF file, but for the loader's PROT_NONE gaps.
            if vma.path.endswith((".so", ".so.6", ".so.2")) and vma.perms[0] == "r":
                assert "lo" in vma.flags, vma
                if "w" not in vma.perms and outside.interpreter_file(process.pid) == vma.path:
                    # A share of each page where processes share it, as in Pss.
                    assert vma.kb["Locked"] == vma.kb["Pss"], vma
                    assert vma.kb["Rss"] << 10 == vma.end - vma.start, vma
        status = Path(f"/proc/{process.pid}/status").read_text()
        locked = int(status.split("VmLck:")[1].split()[0]) << 10
        assert locked == sum(v.end - v.start for v in vmas if "lo" in v.flags)


def test_locking_writable_segments_copies_nothing(python, images):
    """MLOCK_ONFAULT: a plain mlock of a private writable mapping would copy each of its pages."""
    with Process(python) as process:
        process.run("import page_primer.apply.process, ssl, gc; gc.disable()")
        process.prime(image_dir=str(images), mlock=False)

        def dirty():
            return sum(
                v.kb["Private_Dirty"]
                for v in outside.smaps(process.pid)
                if v.path.endswith((".so", ".so.1.0", ".so.3", ".so.6")) and "w" in v.perms
            )

        before = dirty()
        process.prime(image_dir=str(images), mlock=True)
        assert dirty() - before <= 64


def test_off_switch(python, images):
    with Process(python, env={"PAGE_PRIMER": "0"}) as process:
        report = process.prime(image_dir=str(images))
        assert report["reason"] == "switched off"
        vmas = outside.smaps(process.pid)
        assert not any(v.huge and v.path for v in vmas)
        assert not any("lo" in v.flags for v in vmas)
    assert not images.exists()


def test_environment_is_used(python, images):
    env = {"PAGE_PRIMER_BACKING": "memfd", "PAGE_PRIMER_MLOCK": "0"}
    with Process(python, env={**env, "PAGE_PRIMER_IMAGE_DIR": str(images)}) as process:
        report = process.prime()
        assert report["locked_bytes"] == 0
        assert interpreter(report)["backing"] == "memfd"


def test_limit_bounds_the_bytes_copied(python, images):
    with Process(python) as process:
        process.run("import ssl")
        report = process.prime(image_dir=str(images), limit=0, private_limit=0)
        moved = [obj for obj in report["objects"] if obj["copied_bytes"]]
        assert [obj["interpreter"] for obj in moved] == [True]
        others = [obj for obj in report["objects"] if not obj["interpreter"]]
        largest = max(others, key=lambda obj: obj["code_bytes"])
        why = {why for segment in largest["segments"] for why in segment["left"]}
        kind = " for private copies" if has_random_addresses(largest["path"]) else ""
        assert f"over the limit{kind}" in why, largest


def test_include_and_exclude(python, images):
    with Process(python) as process:
        process.run("import ssl")
        report = process.prime(image_dir=str(images), include=["libcrypto*"])
        names = [os.path.basename(path) for path in report["moved"]]
        assert names
        assert all(name.startswith("libcrypto") for name in names)
        assert all(
            obj["locked_bytes"] == 0
            for obj in report["objects"]
            if not os.path.basename(obj["path"]).startswith("libcrypto")
        )


def test_thp_disabled_is_an_outcome(python, images):
    with Process(python) as process:
        process.run("import ctypes; assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0")
        report = process.prime(image_dir=str(images))
        assert report["moved"] == []
        assert report["locked_bytes"] > 0
        core = interpreter(report)
        assert "PR_SET_THP_DISABLE" in str(core["segments"])


@pytest.mark.kernel(6, 3, "PR_SET_MDWE")
@pytest.mark.parametrize(
    ("backing", "works"), [("image", True), ("memfd", True), ("anonymous", False), ("auto", True)]
)
def test_memory_deny_write_execute(python, images, backing, works):
    if backing == "image":
        require_images()
    with Process(python) as process:
        process.run("import ctypes; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0")
        report = process.prime(
            image_dir=str(images), backing=backing, keep_profilers=False, mlock=False
        )
        text = outside.text_of(process.pid, interpreter(report)["path"])
        assert text.huge == (text.attainable if works else 0)
        if not works:
            assert any("protect" in note for note in interpreter(report)["notes"])


def test_hugetlb_without_a_pool_is_an_outcome(python):
    free = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    if free.exists() and int(free.read_text()) > 0:
        pytest.skip("this machine has a hugetlb pool")
    with Process(python) as process:
        report = process.prime(backing="hugetlb", keep_profilers=False)
        assert report["moved"] == []
        (note,) = interpreter(report)["notes"]
        assert note.startswith("hugetlb: ")


def test_modified_code_is_left_alone(python, images):
    """A breakpoint, a uprobe, a hot patch: what is in memory is not what is in the file."""
    with Process(python) as process:
        process.run("import ssl, ctypes, mmap")
        path, start = process.run(
            textwrap.dedent("""
            lines = [l.split() for l in open("/proc/self/maps") if "libcrypto" in l]
            spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
            code = [line[1] for line in lines].index("r-xp")
            libc = ctypes.CDLL(None, use_errno=True)
            libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            # In the first whole huge page of it, wherever it is loaded.
            chunk = (spans[0][0] + (1 << 21) - 1) & -(1 << 21)
            page = max(chunk, spans[code][0])
            assert chunk + (1 << 21) <= spans[code + 1][1] and page < chunk + (1 << 21)
            assert libc.mprotect(page, 4096, 7) == 0
            where = (ctypes.c_ubyte * 4096).from_address(page)
            where[100] ^= 0xFF
            assert libc.mprotect(page, 4096, 5) == 0
            result = [lines[code][5], page]
            """)
        )
        report = process.prime(image_dir=str(images))
        assert "modified in memory" in left_of(report, os.path.basename(path))
        assert path not in report["moved"]
        assert any(
            v.path == path and v.start <= start < v.end for v in outside.smaps(process.pid)
        ), "the modified page is where it was"
        assert interpreter(report)["code_huge_bytes"] > 0


@pytest.mark.kernel(6, 10, "mseal(2)")
def test_sealed_code_is_left_alone(python, images):
    with Process(python) as process:
        process.run("import ssl, ctypes")
        path = process.run(
            textwrap.dedent("""
            line = next(l for l in open("/proc/self/maps") if "libcrypto" in l and "r-xp" in l)
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            syscall = ctypes.CDLL(None, use_errno=True).syscall
            syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
            mseal = 462  # the same on every architecture
            result = syscall(mseal, start, end - start, 0) or line.split()[5]
            """)
        )
        if path == -1:
            pytest.skip("this kernel does not know mseal(2)")
        report = process.prime(image_dir=str(images))
        assert list(left_of(report, os.path.basename(path))) == ["sealed"]
        assert next(o for o in report["objects"] if o["path"] == path)["locked_bytes"] > 0
        assert interpreter(report)["code_huge_bytes"] > 0


def test_file_replaced_on_disk_is_left_alone(python, images, tmp_path):
    library = build_library(tmp_path, "libbig.so")
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        library.rename(tmp_path / "old.so")
        build_library(tmp_path, "libbig.so")
        report = process.prime(image_dir=str(images))
        # Its path is the renamed one, which is the same file still.
        assert "old.so" in [os.path.basename(path) for path in report["moved"]]
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        library.unlink()
        report = process.prime(image_dir=str(images))
        assert list(left_of(report, "libbig.so")) == ["file deleted or replaced on disk"]
        assert process.run("result = lib.answer()") == 42


def load(process, library, *touched):
    """Load it and touch chunks of it; returns the address of the first."""
    return process.run(
        f"import ctypes; lib = ctypes.CDLL({str(library)!r})\n"
        "lib.where.restype = ctypes.c_ulong\n"
        f"for n, size in {touched!r}: lib.touch(n, size)\n"
        "result = lib.where()"
    )


@pytest.mark.images
def test_only_hot_chunks_of_a_library_move(python, images, tmp_path):
    """What this process has hardly touched stays on the file: it is no part of the image, not made
    resident, and locked only as far as it is touched."""
    require_huge_files(images.parent)
    library = chunks_library(tmp_path)
    with Process(python) as process:
        first = load(process, library, (1, PMD), (2, PMD), (3, 4096), (4, PMD // 4))
        report = process.prime(image_dir=str(images), backing="image")
        assert str(library) in report["moved"]
        found = {
            n: next(v for v in outside.smaps(process.pid) if v.start <= first + n * PMD < v.end)
            for n in range(6)
        }
        moved = {n for n, v in found.items() if v.path.startswith(f"{images}/")}
        assert moved == {1, 2, 4}
        for n in moved:
            assert found[n].huge == found[n].end - found[n].start
            assert found[n].perms == "r-xp"
        for n in {0, 3, 5}:
            assert found[n].path == str(library)
            assert found[n].huge == 0
        # What is touched once brings some neighbours along.
        assert sum({found[n].start: found[n].kb["Rss"] for n in (0, 3, 5)}.values()) <= 512
        left = left_of(report, "libchunks.so")
        assert 3 * PMD <= left["hardly touched"] < 4 * PMD
        obj = next(o for o in report["objects"] if o["path"] == str(library))
        assert obj["copied_bytes"] == 3 * PMD
        image = os.stat(obj["where"])
        assert image.st_blocks * 512 < 3 * PMD + (1 << 20), "the rest is a hole"
        assert image.st_size > 6 * PMD
        if not report["lock_refused_bytes"]:
            assert all("lo" in v.flags for v in found.values())
        process.run("for n in range(6): lib.touch(n, 1 << 21)")
        process.restore()
        assert not any(v.path.startswith(f"{images}/") for v in outside.smaps(process.pid))


def test_what_becomes_hot_later_moves_with_the_next_library(python, images, tmp_path):
    library = chunks_library(tmp_path)
    with Process(python) as process:
        first = load(process, library, (3, 4096))
        report = process.prime(image_dir=str(images))
        assert str(library) not in report["moved"]
        assert left_of(report, "libchunks.so").keys() == {"hardly touched"}
        process.run("lib.touch(3, 1 << 21); import _decimal, _ctypes_test")
        report = process.prime(image_dir=str(images))
        assert str(library) in report["moved"]
        (vma,) = [v for v in outside.smaps(process.pid) if v.start == first + 3 * PMD]
        assert vma.end - vma.start == PMD


def test_where_pagemap_is_closed_smaps_tells_what_was_touched(python, images, tmp_path):
    """A process that dropped its privileges may not read its own page tables."""
    library = chunks_library(tmp_path)
    with Process(python) as process:
        load(process, library, *((n, PMD) for n in range(6)))
        process.run(
            "from page_primer.kernel.pagemap import Pagemap\n"
            "Pagemap.closed = property(lambda self: True)"
        )
        report = process.prime(image_dir=str(images))
        assert str(library) in report["moved"]
    with Process(python) as process:
        load(process, library, (2, 4096))
        process.run(
            "from page_primer.kernel.pagemap import Pagemap\n"
            "Pagemap.closed = property(lambda self: True)"
        )
        report = process.prime(image_dir=str(images))
        assert left_of(report, "libchunks.so").keys() == {"hardly touched"}


def test_private_copies_have_a_limit_of_their_own(python, images):
    """At a random load address nobody will share an image: the hottest chunks alone are copied."""
    require_huge_files(images.parent)
    # Where libraries are not aligned, as on overlayfs.
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        library = chunks_library(Path(directory))
        for _ in range(8):
            with Process(python) as process:
                try:
                    load(process, library, (1, PMD), (2, PMD // 2), (3, PMD), (4, PMD // 2))
                except Failed:
                    pytest.skip("/dev/shm is mounted noexec here")
                (base, *_) = [v for v in outside.smaps(process.pid) if v.path == str(library)]
                if base.start % PMD == 0:
                    continue
                options = {"image_dir": str(images), "backing": "image"}
                report = process.prime(private_limit=2 * PMD + 4096, limit=0, **options)
                obj = next(o for o in report["objects"] if o["path"] == str(library))
                assert obj["copied_bytes"] == 2 * PMD
                process.restore()
                report = process.prime(private_limit=PMD - 1, **options)
                assert left_of(report, "libchunks.so").keys() == {OVER_PRIVATE_LIMIT}
                return
    pytest.skip("/dev/shm aligns every library here")


@pytest.mark.slow
def test_unloaded_and_loaded_again(python, images, tmp_path):
    library = build_library(tmp_path, "libbig.so")
    with Process(python) as process:
        process.run(f"import ctypes, _ctypes; path = {str(library)!r}; lib = ctypes.CDLL(path)")
        for _ in range(3):
            report = process.prime(image_dir=str(images))
            assert str(library) in report["moved"]
            text = outside.text_of(process.pid, str(library))
            assert text.huge == text.attainable > 0
            assert process.run("result = lib.answer()") == 42
            process.run("_ctypes.dlclose(lib._handle)")
            assert not any("libbig" in v.path for v in outside.smaps(process.pid))
            assert not any("libbig" in o["path"] for o in process.prime()["objects"])
            process.run("lib = ctypes.CDLL(path)")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-Wl,-z,noseparate-code",),
        ("-Wl,-z,max-page-size=0x200000",),
        ("-Wl,-z,max-page-size=0x200000", "-Wl,-z,noseparate-code"),
        ("-Wl,--build-id=none",),
        ("-s",),
    ],
    ids=["plain", "noseparate", "aligned", "aligned-noseparate", "no-build-id", "stripped"],
)
def test_linker_layouts(python, images, tmp_path, flags):
    library = build_library(tmp_path, "liblayout.so", *flags)
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        report = process.prime(image_dir=str(images))
        assert str(library) in report["moved"], left_of(report, "liblayout.so")
        text = outside.text_of(process.pid, str(library))
        assert text.huge == text.attainable >= 2 * MIB
        assert process.run("result = lib.answer()") == 42


def test_text_relocations_are_left_alone(python, images, tmp_path):
    source = BIG + 'extern int errno_; __asm__(".text\\n.quad answer\\n");'
    library = build(
        tmp_path, "libtextrel.so", source, "-shared", "-fPIC", "-Wl,-z,notext", "-Wl,-z,lazy"
    )
    with Process(python) as process:
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r})")
        report = process.prime(image_dir=str(images))
        assert "text relocations" in left_of(report, "libtextrel.so")


# Where the huge page of a PIE's header and first code is whole, it is kept; else nothing need be.
PIE_LAYOUTS = {"plain": (), "aligned": ("-Wl,-z,max-page-size=0x200000", "-Wl,-z,noseparate-code")}


@pytest.mark.slow
@pytest.mark.parametrize("layout", PIE_LAYOUTS)
@pytest.mark.images
def test_static_pie_keeps_its_head_on_the_file(images, tmp_path, layout):
    """A static PIE interpreter, built from Debian's archive where it is installed."""
    if not ARCHIVE.exists():
        pytest.skip(f"no {ARCHIVE.name} ({PACKAGE}) to build a static PIE from")
    build_pie(path := tmp_path / f"{os.path.basename(DEBIAN)}-pie", PIE_LAYOUTS[layout])
    packages = os.path.dirname(os.path.dirname(page_primer.__file__))
    env = {"PYTHONPATH": f"{packages}:{sysconfig.get_path('purelib')}", "PYTHONHOME": "/usr"}
    with Process(str(path), env=env) as process:
        before = outside.file_mappings(process.pid)
        report = process.prime(image_dir=str(images))
        core = interpreter(report)
        assert (core["path"], core["backing"]) == (str(path), "image")
        kept = left_of(report, path.name).get("kept for profilers", 0)
        assert kept or layout == "plain"
        first_code = min(v.start for v in outside.smaps(process.pid) if "x" in v.perms)
        on_file = [v for v in outside.smaps(process.pid) if v.path == str(path)]
        assert first_code in [v.start for v in on_file]
        text = outside.text_of(process.pid, str(path))
        assert text.attainable - kept <= text.huge > 0
        dump = subprocess.run(
            [os.path.join(os.path.dirname(sys.executable), "py-spy"), "dump", "--pid",
             str(process.pid)], capture_output=True, text=True,
        )  # fmt: skip
        assert "driver.py" in dump.stdout, dump.stderr
        process.restore()
        assert [m for m in before if m not in outside.file_mappings(process.pid)] == []
        process.prime(image_dir=str(images), keep_profilers=False)
        text = outside.text_of(process.pid, str(path))
        assert text.huge == text.attainable


def test_prime_from_many_threads_at_once(python, images):
    source = """
        import threading, page_primer
        reports = []
        def call(): reports.append(page_primer.prime(image_dir=%r))
        threads = [threading.Thread(target=call) for _ in range(8)]
        for t in threads: t.start()
        for t in threads: t.join()
        result = [sum(len(r.moved) > 0 for r in reports), [r.reason for r in reports]]
    """
    with Process(python) as process:
        moved, reasons = process.run(textwrap.dedent(source) % str(images))
        assert moved == 1
        assert reasons == [None] * 8


@pytest.mark.slow
def test_fork_while_another_thread_primes(python, images):
    """A child forked in the middle must find a book that is whole and a lock that is free."""
    source = """
        import os, threading, time, page_primer
        import page_primer.apply.process
        stop = False
        def loop():
            while not stop:
                page_primer.prime(image_dir=%r); page_primer.restore()
        thread = threading.Thread(target=loop); thread.start()
        bad = 0
        for _ in range(60):
            pid = os.fork()
            if pid == 0:
                r = page_primer.prime(image_dir=%r)
                os._exit(0 if r.interpreter.code_huge_bytes else 9)
            bad += os.waitpid(pid, 0)[1] != 0
        stop = True; thread.join()
        result = bad
    """
    with Process(python) as process:
        assert process.run(textwrap.dedent(source) % (str(images), str(images))) == 0


@pytest.mark.images
def test_daemon_that_closes_its_descriptors(python, images):
    """The lock on the image is gone then, and a number of ours may be somebody else's file."""
    source = """
        import os, page_primer
        page_primer.prime(image_dir=%r)
        image = page_primer.apply.process.process.registry.primed.copy().popitem()[1].prepared.image
        lock = image.lock.fileno()
        os.closerange(3, 256)
        mine = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        page_primer.restore()
        for fd in mine: os.fstat(fd)
        result = lock in mine
    """
    with Process(python) as process:
        assert process.run(textwrap.dedent(source) % str(images)) is True


SUB_INTERPRETERS = """
import sys
sys.path[:0] = {path!r}
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters

def create():
    if {isolated}:
        try:
            return interpreters.create("isolated")  # 3.13
        except TypeError:
            return interpreters.create(isolated=True)
    try:
        return interpreters.create("legacy")
    except TypeError:
        return interpreters.create(isolated=False)

def run(other, code, **values):
    names = "".join(f"{{name}} = {{value!r}}\\n" for name, value in values.items())
    head = "import sys; sys.path[:0] = {path!r}; import page_primer; options = {options!r}\\n"
    problem = interpreters.run_string(other, head + names + code)
    assert problem is None, problem

def moved():  # mappings of images, or of memory files
    with open("/proc/self/maps") as maps:
        return [line for line in maps if {images!r} in line or "/memfd:" in line]

options = {options!r}
other = create()
"""

PRIMED_AFTER = """
import page_primer
huge = page_primer.prime(**options).interpreter.code_huge_bytes
before = moved()
run(other, '''
report = page_primer.prime(**options)
assert report.reason is None and not report.moved, report
assert report.interpreter.code_huge_bytes == huge, report
report = page_primer.restore()
assert report.reason is None and report.interpreter.code_huge_bytes == huge, report
''', huge=huge)
assert moved() == before != []
interpreters.destroy(other)
page_primer.restore()
assert moved() == []
print("fine")
"""

PRIMED_FIRST = """
PRIME = '''
report = page_primer.prime(**options)
assert report.reason is None and report.interpreter.path in report.moved, report
assert report.interpreter.code_huge_bytes > 0, report
'''
run(other, PRIME)
before = moved()
assert before
import page_primer
report = page_primer.prime(**options)
assert report.reason is None and not report.moved, report
assert report.interpreter.code_huge_bytes > 0, report
# What another one has moved it does not put back, and that one does.
page_primer.restore()
assert moved() == before
run(other, "report = page_primer.restore(); assert report.reason is None, report")
assert moved() == []
# Then it is anybody's again: the main one's; and that of one which ends without restore().
report = page_primer.prime(**options)
assert report.interpreter.path in report.moved, report
page_primer.restore()
assert moved() == []
run(other, PRIME)
before = moved()
interpreters.destroy(other)
assert moved() == before != []
import os
held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")]
assert any(path.endswith("/.users") for path in held) or "/memfd:" in before[0], held
report = page_primer.restore()
assert report.reason is None and report.interpreter.code_huge_bytes > 0, report
import json, decimal
assert json.loads(json.dumps([1.5])) == [1.5] and decimal.Decimal(1) / 4
print("fine")
"""


@pytest.mark.parametrize("isolated", [False, True], ids=["legacy", "own GIL"])
@pytest.mark.parametrize("source", [PRIMED_AFTER, PRIMED_FIRST], ids=["after", "first"])
def test_sub_interpreter(every_python, images, isolated, source):
    """The moves are the process's: another interpreter finds them done, and whose they are can put
    them back. With a GIL of its own (3.12 and newer) it loads the core too."""
    packages = Path(page_primer.__file__).parents[1]
    options = {"image_dir": str(images), "keep_profilers": False}
    head = SUB_INTERPRETERS.format(
        path=[str(packages)], images=f"{images}/", isolated=isolated, options=options
    )
    done = subprocess.run([every_python, "-c", head + source], capture_output=True, text=True)
    assert done.stdout == "fine\n", done.stderr


def test_exec_after_prime_keeps_working(python, images):
    """uWSGI, gunicorn's USR2: a primed process execs another program."""
    code = (
        "import page_primer, os, sys; page_primer.prime(image_dir=%r); "
        "os.execv(sys.executable, [sys.executable, '-c', 'print(1 + 1)'])" % str(images)
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("2\n", 0)


GONE = """
import json, os, sys
import page_primer
page_primer.on_process(lambda process: process.start_heap(page_primer.Options()))
place = os.path.dirname(page_primer.__file__)
assert place.startswith(sys.argv[1])
os.rename(place, place + ".old")
print(json.dumps(page_primer.prime().as_dict()))
"""


def test_a_package_that_is_replaced_under_a_running_server(python, tmp_path):
    """What copies need is loaded with the first one, and is gone: the rest is done."""
    shutil.copytree(os.path.dirname(page_primer.__file__), tmp_path / "page_primer")
    done = subprocess.run(
        [python, "-c", GONE, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["reason"] is None, report["detail"]
    assert report["locked_bytes"] > MIB, report
    assert "No module named" in " ".join(interpreter(report)["notes"]), interpreter(report)


def test_report_reads_well(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        text = process.run("result = str(report)")
        assert text.startswith("100 % of ") or "% of " in text.splitlines()[0]
        assert ("image in" if has_images() else "memfd") in text.splitlines()[0]
        assert process.run("import json; result = len(json.dumps(report.as_dict()))") > 1000


@pytest.mark.parametrize("action", ["os.fork() or os._exit(0)", "page_primer.prime()"])
def test_a_signal_handler_in_the_midst_of_prime(python, images, action):
    """It may fork, and it may even call prime(): neither may hang."""
    source = """
        import os, signal, page_primer, page_primer.apply.process, page_primer.survey as survey
        take = survey.take
        def interrupted(*read):
            os.kill(os.getpid(), signal.SIGUSR1)
            return take(*read)
        survey.take = interrupted
        signal.signal(signal.SIGUSR1, lambda *_: %s)
        result = page_primer.prime(image_dir=%r).as_dict()
    """
    with Process(python) as process:
        report = process.run(textwrap.dedent(source) % (action, str(images)))
        assert interpreter(report)["code_huge_bytes"] > 0


@pytest.mark.images
def test_image_directory_with_a_trailing_slash(python, images):
    with Process(python) as process:
        core = interpreter(process.prime(image_dir=f"{images}//"))
        assert re.match(rf"{re.escape(str(images))}/\d+-", core["where"])


def test_an_object_that_is_put_back_keeps_no_lock_of_ours(python):
    """Also of what stayed on its file meanwhile: it would count against the limit, and outlive
    restore()."""
    with Process(python) as process:
        start, end = process.run(
            "from page_primer import survey\n"
            "from page_primer.apply.mlocks import Mlocks\n"
            "from page_primer.mlock_plan import Lock\n"
            "found = survey.take()\n"
            "libc = next(o for o in found.objects if 'libc.so' in o.path)\n"
            "end = next(m.end for m in found.mappings if m.start <= libc.start < m.end)\n"
            "mlocks = Mlocks()\n"
            "mlocks.make([Lock(libc, libc.start, end, 'data', True)])\n"
            "result = libc.start, end\n"
        )
        locked = {v.start for v in outside.smaps(process.pid) if "lo" in v.flags}
        assert locked == {start}
        process.run("mlocks.put_back(libc); result = None")
        assert not [v for v in outside.smaps(process.pid) if "lo" in v.flags], (start, end)
