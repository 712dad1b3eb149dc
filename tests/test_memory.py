"""The guard: what memory allows, read from made-up trees of files, and obeyed in real cgroups."""

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack, nullcontext

import pytest
from harness import outside
from harness.cgroup import Cgroup
from harness.environments import Made, Unavailable
from harness.gunicorn_server import Gunicorn, require_no_failure
from harness.hostile_places import MAPPINGS, old_map_limit
from harness.libraries import build_library
from harness.placement import require_executable
from harness.process import Process, interpreter

from page_primer import family
from page_primer.kernel import memory
from page_primer.kernel.memory import Memory
from page_primer.reasons import Declined

MIB = 1 << 20


def tree(root, files):
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return str(root)


def machine(available=1 << 20, total=1 << 21):
    return f"MemTotal: {total} kB\nMemFree: 5 kB\nMemAvailable:   {available} kB\nHugePages: 0\n"


V2 = "31 23 0:28 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
OTHER_V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"


def stat(inactive=0, active=0, prefix=""):
    return (
        f"anon 999\n{prefix}inactive_file {inactive}\n{prefix}active_file {active}\nunevictable 7"
    )


def v2(path, limit="max", high="max", current=0, **pages):
    at = f"sys/fs/cgroup{path}"
    return {
        f"{at}/memory.max": f"{limit}\n", f"{at}/memory.high": f"{high}\n",
        f"{at}/memory.current": f"{current}\n", f"{at}/memory.stat": stat(**pages),
    }  # fmt: skip


def v1(path, limit, current=0, **pages):
    at = f"sys/fs/cgroup/memory{path}"
    return {
        f"{at}/memory.limit_in_bytes": f"{limit}\n", f"{at}/memory.usage_in_bytes": f"{current}\n",
        f"{at}/memory.stat": stat(prefix="total_", **pages),
    }  # fmt: skip


def proc(mountinfo, cgroup, meminfo=None):
    return {
        "proc/meminfo": machine() if meminfo is None else meminfo,
        "proc/self/mountinfo": mountinfo, "proc/self/cgroup": cgroup,
    }  # fmt: skip


def test_the_machine_alone(tmp_path):
    root = tree(tmp_path, proc("", "", machine(100, 4000)))
    assert memory.read(root) == Memory(100 << 10, 4000 << 10, "/proc/meminfo")
    assert memory.read(tree(tmp_path / "none", {})) is None


def test_version_2_the_tightest_of_all_levels(tmp_path):
    files = {
        **proc(OTHER_V1 + V2.format(root="/"), "7:cpu:/x\n0::/pod/app\n"),
        **v2("/pod/app", limit=100 * MIB, current=50 * MIB, inactive=10 * MIB, active=20 * MIB),
        **v2("/pod", limit=90 * MIB, high=64 * MIB, current=60 * MIB, inactive=MIB),
    }
    root = tree(tmp_path, files)
    assert [(m.available // MIB, m.where) for m in memory.bounds(root)] == [
        (1024, "/proc/meminfo"),
        (80, "/sys/fs/cgroup/pod/app/memory.max"),
        (31, "/sys/fs/cgroup/pod/memory.max"),
        (5, "/sys/fs/cgroup/pod/memory.high"),
    ]
    assert memory.read(root) == Memory(5 * MIB, 64 * MIB, "/sys/fs/cgroup/pod/memory.high")
    tree(tmp_path, v2("/pod", limit=90 * MIB, current=91 * MIB))
    assert memory.read(root).available == 0


@pytest.mark.parametrize("path", ["/", "/../elsewhere"])
def test_version_2_in_a_namespace(tmp_path, path):
    """A container sees its own cgroup as the root, whatever it is called outside."""
    files = {**proc(V2.format(root="/"), f"0::{path}\n"), **v2("", limit=40 * MIB, current=MIB)}
    found = memory.read(tree(tmp_path, files))
    assert found == Memory(39 * MIB, 40 * MIB, "/sys/fs/cgroup/memory.max")


def test_version_1_in_a_container_and_without_a_limit(tmp_path):
    mounts = OTHER_V1 + V1.format(root="/docker/1f") + V2.format(root="/").replace("group ", "g ")
    no_limit = 9223372036854771712
    files = {
        **proc(mounts, "4:memory:/docker/1f/inner\n1:cpu:/docker/1f\n0::/\n"),
        **v1("", 32 * MIB, 20 * MIB, active=4 * MIB), **v1("/inner", no_limit, 9 * MIB),
    }  # fmt: skip
    found = list(memory.bounds(tree(tmp_path, files)))
    assert found[1:] == [Memory(16 * MIB, 32 * MIB, "/sys/fs/cgroup/memory/memory.limit_in_bytes")]


def test_what_is_too_little_for_a_server_that_forks(tmp_path):
    """Of its limit an eleventh at least must be enough for what each process will have of ours."""
    files = {**proc(V2.format(root="/"), "0::/\n"), **v2("", limit=110 * MIB, current=MIB)}
    root = tree(tmp_path, files)
    try:
        for children in (0, 2):
            family.expect(children)
            assert family.shortage(root) is None
        family.expect(4)
        assert family.shortage(root) == Memory(109 * MIB, 110 * MIB, "/sys/fs/cgroup/memory.max")
        tree(tmp_path, v2("", limit=200 * MIB, current=150 * MIB))
        assert family.shortage(root) is None
        family.expect(0)
        tree(tmp_path, v2("", limit=200 * MIB, current=193 * MIB))
        assert family.shortage(root).available == 7 * MIB
    finally:
        family.expect(0)


FORKING = """
import json, os, page_primer
from page_primer.integrations import expect_forks
page_primer.prime(remap=False, mlock=False)
from page_primer import survey
def fork():  # and go on in the child
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
fork()  # gunicorn --daemon
found = [survey.take().siblings]
expect_forks(16)
found.append(survey.take().siblings)
fork()
found.append(survey.take().siblings)
print(json.dumps(found), flush=True)
"""


def test_what_a_daemon_copies_its_children_inherit(python):
    """It was forked itself, but is none of those that were told of."""
    done = subprocess.run([python, "-c", FORKING], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 1, 17]


HEAP_FIRST = """
import json, os, page_primer
from page_primer.integrations import expect_forks
options = page_primer.Options.load({"heap": True, "heap_min_memory": 0})
page_primer.on_process(lambda process: process.start_heap(options))
def show(report):
    print(json.dumps([report.reason, report.detail, len(report.moved)]), flush=True)
expect_forks(4)
show(page_primer.prime(options))
if os.fork() == 0:
    show(page_primer.prime(options))
    os._exit(0)
os.wait()
expect_forks(2)  # after a HUP
show(page_primer.prime(options))
"""


def test_the_heap_that_is_there_first_changes_nothing_about_too_little_memory(python, images):
    """gunicorn's configuration starts it, before it is known how many processes there will be."""
    with Cgroup(110 * MIB) as cgroup:
        done = subprocess.run(
            [*cgroup.wrapper, python, "-c", HEAP_FIRST], capture_output=True, text=True,
            env={"PAGE_PRIMER_IMAGE_DIR": str(images)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        master, child, with_fewer = map(json.loads, done.stdout.splitlines())
        for reason, detail, _ in (master, child):
            assert reason == "too little memory"
            assert detail.endswith("5 processes need 140.2 MiB"), detail
        assert with_fewer[0] is None
        assert with_fewer[2] > 0


@pytest.mark.parametrize(
    ("count", "declined"), [(3, False), (619, False), (620, True), (640, True)]
)
def test_a_32nd_of_the_mappings_is_the_hosts(tmp_path, count, declined):
    files = {"proc/sys/vm/max_map_count": "640\n", "proc/self/maps": "1-2 r--p 0 0:0 0\n" * count}
    root = tree(tmp_path, files)
    expected = pytest.raises(Declined, match=rf"^too many mappings: {count} of 640 \(")
    with expected if declined else nullcontext():
        memory.require_mappings(root)
    (tmp_path / "proc/sys/vm/max_map_count").unlink()
    memory.require_mappings(root)  # nothing is known


# In a child, which has no locks yet; and when there are few mappings again.
DECLINED_IN_CHILD = """
import os
def locked():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps") if line[:7] == "Locked:")
parents = locked()
child = os.fork()
if child == 0:
    declined = page_primer.prime(image_dir={images!r}).reason
    none = locked()
    libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(page * (most + 8)))
    reason = page_primer.prime(image_dir={images!r}).reason
    os._exit((declined, none, reason, locked() > 0) != ("too many mappings", 0, None, parents > 0))
result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@pytest.mark.slow
def test_later_calls_leave_the_last_mappings_to_the_host(python, images, tmp_path):
    """When something was loaded since, and nearly all that the kernel allows is in use."""
    with Process(python) as process, ExitStack() as stack:
        try:
            old_map_limit(Made(python, tmp_path, {}), stack)
        except Unavailable as why:
            pytest.skip(str(why))
        assert process.prime(image_dir=str(images))["reason"] is None
        library = build_library(tmp_path, "late")
        process.run(f"import ctypes; ctypes.CDLL({str(library)!r})\n" + MAPPINGS.format(left=40))
        count = len(outside.smaps(process.pid))
        again = process.prime(image_dir=str(images))
        assert again["reason"] == "too many mappings"
        assert again["detail"].endswith("(vm.max_map_count)")
        assert len(outside.smaps(process.pid)) <= count + 2
        assert process.run(DECLINED_IN_CHILD.format(images=str(images))) == 0
        assert process.run("result = len([str(n) for n in range(100_000)])") == 100_000
        assert process.restore()["reason"] is None
        assert process.run("result = len([str(n) for n in range(100_000)])") == 100_000


def test_a_real_cgroup_and_the_one_around_it(python):
    source = (
        "from page_primer.kernel import memory\n"
        "result = [[m.available, m.limit, m.where] for m in memory.bounds()], memory.read().where"
    )
    with Cgroup(96 * MIB) as around, Cgroup(128 * MIB, inside=around) as cgroup:
        wrapper = cgroup.wrapper
        with Process(python, wrapper=wrapper) as process:
            bounds, tightest = process.run(source)
            assert tightest == f"{around.path}/{around.limit_file}"
            for one in (around, cgroup):
                # The kernel charges in batches, and may give some back between the two readings:
                # hardly each time.
                for _ in range(20):
                    bounds, _ = process.run(source)
                    found = {where: (available, limit) for available, limit, where in bounds}
                    available, limit = found[f"{one.path}/{one.limit_file}"]
                    assert limit == one.limit
                    if limit - one.usage <= available:
                        break
                assert limit - one.usage <= available < limit
            # Of what is anonymous nothing can be reclaimed; of a file that was read all.
            process.run("block = bytearray(b'x') * (20 << 20)")
            bounds, _ = process.run(source)
            more = next(m[0] for m in bounds if m[2] == tightest)
            before = found[tightest][0]
            assert before - 24 * MIB < more < before - 16 * MIB


SERVING = """
import json, mmap, os, sys
LIBRARIES = sys.argv[2:]
for path in LIBRARIES:
    __import__(path)
import page_primer
report = page_primer.prime(image_dir=sys.argv[1])
from page_primer.kernel import smaps
locked = sum(m.count("Rss") for m in smaps.read_smaps() if m.is_locked)
print(json.dumps({"report": report.as_dict(), "said": str(report), "locked": locked}))
import json.tool, decimal, http.client  # it lives on
"""


@pytest.mark.slow
@pytest.mark.parametrize("backing", ["auto", "image on tmpfs", "memfd", "anonymous"])
@pytest.mark.parametrize("limit", [14, 18, 24, 28, 32, 40, 48, 96])
def test_a_small_cgroup_is_never_killed_by_priming(python, images, limit, backing):
    """The interpreter and OpenSSL, 5 MiB each, and a limit that the rest of the process fits. What
    is written to a tmpfs cannot be reclaimed, debug information included."""
    if backing == "image on tmpfs":
        require_executable("/dev/shm")
    with (
        Cgroup(limit * MIB) as cgroup,
        tempfile.TemporaryDirectory(prefix="page-primer-", dir="/dev/shm") as memory,
    ):
        store = f"{memory}/images" if backing == "image on tmpfs" else str(images)
        done = subprocess.run(
            [*cgroup.wrapper, python, "-c", SERVING, store, "ssl", "sqlite3"],
            capture_output=True, text=True, check=False,
            env={"PAGE_PRIMER_BACKING": backing.partition(" ")[0]},
        )  # fmt: skip
        assert (done.returncode, cgroup.oom_kills) == (0, 0), done.stderr
        answer = json.loads(done.stdout)
        report, said = answer["report"], answer["said"]
        if report["reason"]:
            assert f"too little memory: {report['detail']}" in said
            assert limit < 24
            return
        bound = report["memory"]
        assert bound["limit"] == limit * MIB
        assert bound["where"].startswith(cgroup.path)
        copied = sum(obj["copied_bytes"] for obj in report["objects"])
        # What reading smaps and printing have touched since comes on top.
        assert max(copied, answer["locked"]) <= bound["available"] // 4 + MIB
        if limit <= 32:
            assert report["lock_withheld_bytes"] > 0
            assert "to leave memory to others" in said
            assert f"of {limit}.0 MiB ({bound['where']})" in said
        if limit == 96:
            assert interpreter(report)["code_huge_bytes"] > 0
            assert report["lock_withheld_bytes"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("limit", [56, 112, 160])
def test_gunicorn_serves_in_a_small_cgroup(python, images, tmp_path, limit):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Cgroup(limit * MIB) as cgroup:
        wrapper = cgroup.wrapper
        with Gunicorn(python, tmp_path, "--workers", "2", env=env, wrapper=wrapper) as server:
            server.wait_for_workers(2)
            workers = server.workers
            for _ in range(20):
                assert int(server.get()) in workers
            assert server.get("/late")
            assert server.workers == workers
            assert cgroup.oom_kills == 0
            require_no_failure(server)
            lines = [message for _, message in server.lines("INFO")]
            if limit == 56:  # too small for three of its processes, which it knows of beforehand
                (line,) = lines
                assert line.startswith("nothing done: too little memory"), lines
                assert f"of {limit}.0 MiB ({cgroup.path}" in line
                need = 11 * (3 * family.EACH + family.COPY) / MIB
                assert line.endswith(f": 3 processes need {need:.1f} MiB"), line
            else:
                assert not [line for line in lines if "memory" in line], lines
                assert outside.text_of(server.master).huge


def test_a_child_locks_what_its_parent_locked_although_nothing_is_left(python, images):
    """It is in memory already: to lock it once more takes nothing."""
    with Cgroup(96 * MIB) as cgroup:
        wrapper = cgroup.wrapper
        with Process(python, wrapper=wrapper) as process:
            report = process.prime(image_dir=str(images))
            assert report["lock_withheld_bytes"] == 0
            process.run("block = bytearray(b'x') * (40 << 20)")
            locked = process.run(
                "import os\nreading, told = os.pipe()\n"
                "child = os.fork()\n"
                "if child == 0:\n"
                "    import sqlite3\n"  # something new, so that all is gone through again
                "    report = page_primer.prime(image_dir=%r)\n"
                "    os.write(told, str(report.locked_bytes).encode()); os._exit(0)\n"
                "os.waitpid(child, 0); result = int(os.read(reading, 100))" % str(images)
            )
            assert locked >= report["locked_bytes"]
            assert outside.text_of(process.pid).locked
            assert cgroup.oom_kills == 0


def test_the_share_is_an_option(python, images):
    with Cgroup(48 * MIB) as cgroup:
        for share in (0.05, 0.9):
            with Process(python, wrapper=cgroup.wrapper) as process:
                report = process.prime(image_dir=str(images), memory_share=share)
                assert (report["lock_withheld_bytes"] > 0) == (share < 0.5)
                room = share * report["memory"]["available"]
                locked = [v.kb["Rss"] for v in outside.smaps(process.pid) if "lo" in v.flags]
                assert sum(locked) << 10 <= room + MIB


def test_doctor_tells_what_memory_allows():
    source = (
        "import json; from page_primer import doctor; from page_primer.options import Options\n"
        "checks = doctor.examine(Options())\n"
        "print(json.dumps([[c.status, c.found, c.fix] for c in checks if 'available' in c.name]))"
    )
    for limit, status in ((40, "warning"), (1024, "ok")):
        with Cgroup(limit * MIB) as cgroup:
            done = subprocess.run(
                [*cgroup.wrapper, sys.executable, "-c", source], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            ((found, text, fix),) = json.loads(done.stdout)
            assert found == status
            assert f"{limit}.0 MiB ({cgroup.path}" in text
            assert (fix is not None) == (status == "warning")
        if fix:
            # The line is right: with that limit it is well.
            with Cgroup(int(fix.partition("--memory=")[2].partition("m")[0]) * MIB) as cgroup:
                done = subprocess.run(
                    [*cgroup.wrapper, sys.executable, "-c", source], capture_output=True, text=True
                )
                assert json.loads(done.stdout)[0][0] == "ok", done.stdout
