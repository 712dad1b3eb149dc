"""What locking is for: a worker whose memory cgroup is under pressure. Its code stays, and nothing
is copied for that. The worker runs on a copy of its own of the interpreter, since pages belong to
the cgroup that touched them first, and other processes keep the machine's interpreter in memory."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from harness import outside, pressure
from harness.cgroup import Cgroup
from harness.gunicorn_server import Gunicorn
from harness.privileges import locks_fit
from harness.recording import recording
from harness.servers import wait_for

pytestmark = pytest.mark.slow

MIB = 1 << 20
APP = """
import os, json, re, sqlite3, decimal, hashlib
def app(environ, start_response):
    base = sqlite3.connect(":memory:")
    rows = base.execute("select 1, 'a' union select 2, 'b'").fetchall()
    text = json.dumps({"rows": rows, "sum": str(sum(decimal.Decimal(n) for n, _ in rows))})
    hashlib.sha256(re.sub("[a-z]", "x", text).encode()).hexdigest()
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.fixture(scope="module")
def own():
    """An interpreter with its libraries in a directory of its own, out of memory: python, env."""
    # Not under /tmp, which may be a tmpfs.
    with tempfile.TemporaryDirectory(prefix="page-primer-own-", dir="/var/tmp") as home:
        pressure.private_copy(Path(home) / "own")
        python = next((Path(home) / "own" / "bin").iterdir())
        yield str(python), pressure.environment(Path(home) / "own")


def press(cgroup, directory):
    stream = Path(directory) / "stream"
    with open(stream, "wb") as file:
        file.truncate(320 * MIB)
    pressure.stream_through(cgroup, stream)


def elf_faults(server, worker, directory):
    """Major faults in ELF-backed memory that one request takes, by perf: what, and where."""
    data = str(Path(directory) / "perf.data")
    # Without its cache, which has hard links: they change a time by which images name their files.
    options = ["-N", "-e", "major-faults", "-c", "1", "-d", "-p", str(worker), "-o", data]
    with recording("perf", *options) as perf:
        assert perf.running, perf.said
        assert int(server.get()) == worker
    listed = subprocess.run(
        ["perf", "script", "-i", data, "-F", "addr"], capture_output=True, text=True
    ).stdout
    vmas = outside.smaps(worker)
    found = []
    for address in (int(word, 16) for word in listed.split()):
        vma = next(v for v in vmas if v.start <= address < v.end)
        if vma.path.startswith("/"):
            found.append((vma.path, vma.perms))
    return found


def started(own, directory, images, *options, wrapper=(), **more):
    python, env = own
    env = {**env, "PAGE_PRIMER_IMAGE_DIR": str(images), **more}
    directory.mkdir()
    return Gunicorn(python, directory, *options, env=env, app=APP, wrapper=wrapper)


def test_under_pressure_nothing_of_a_primed_worker_is_read_again(own, images, tmp_path):
    """The unprimed one beside it reads its code from the disk once more: the pressure is real."""
    if not shutil.which("perf"):
        pytest.skip("no perf (Debian's package linux-perf)")
    faults = {}
    for name, more in (("unprimed", {"PAGE_PRIMER": "0"}), ("primed", {}),
                       ("code", {"PAGE_PRIMER_MLOCK": "code"})):  # fmt: skip
        with Cgroup(160 * MIB) as cgroup:
            work = tmp_path / name
            with started(own, work, images, wrapper=cgroup.wrapper, **more) as server:
                (worker,) = server.workers
                for _ in range(10):
                    assert int(server.get()) == worker
                cgroup.limit = 80 * MIB
                for _ in range(4):  # what the kernel drops first is its own choice
                    press(cgroup, work)
                    faults[name] = elf_faults(server, worker, work)
                    if name != "unprimed" or len(faults[name]) >= 8:
                        break
                assert cgroup.oom_kills == 0
        shutil.rmtree(images, ignore_errors=True)
    assert len(faults["unprimed"]) >= 8
    assert faults["primed"] == []
    assert [where for where in faults["code"] if "x" in where[1]] == []


def test_with_8_mib_the_hottest_code_is_locked_and_stays(own, images, tmp_path):
    wrapper = ["prlimit", "--memlock=8388608:8388608"]
    if os.geteuid() == 0:
        wrapper += ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    with Cgroup(160 * MIB) as cgroup:
        everything = [*cgroup.wrapper, *wrapper]
        with started(own, tmp_path / "work", images, wrapper=everything) as server:
            (worker,) = server.workers
            for _ in range(10):
                server.get()
            locked = [v for v in outside.smaps(worker) if "lo" in v.flags]
            assert sum(v.end - v.start for v in locked) <= 8 * MIB
            text = outside.text_of(worker)
            assert text.locked
            # Code came first: nothing writable, and hardly read-only data, took room from it.
            assert {v.perms for v in locked if v.end - v.start > MIB} == {"r-xp"}
            cgroup.limit = 80 * MIB
            press(cgroup, tmp_path / "work")
            code = [v for v in text.span_vmas if "x" in v.perms]
            now = {v.start: v for v in outside.smaps(worker)}
            for vma in code:
                if "lo" in vma.flags:
                    assert now[vma.start].kb["Rss"] << 10 == vma.end - vma.start
            if shutil.which("perf"):
                found = elf_faults(server, worker, tmp_path / "work")
                ranges = {(v.path, v.perms) for v in code}
                assert [where for where in found if where in ranges] == []


def private_dirty(pid):
    """Bytes, of mappings of files."""
    return sum(v.kb["Private_Dirty"] for v in outside.smaps(pid) if v.path.startswith("/")) << 10


@pytest.mark.parametrize("workers", [1, 3])
def test_locking_copies_nothing_in_workers(python, images, tmp_path, workers):
    """Each worker holds before its lock what it holds after it, but for 64 KiB at most."""
    conf = tmp_path / "conf.py"
    conf.write_text(
        "from page_primer.integrations import gunicorn as ours\n"
        "on_starting = ours.on_starting\n"
        "def dirty():\n"
        "    total, path = 0, ''\n"
        "    for line in open('/proc/self/smaps'):\n"
        "        row = line.split()\n"
        "        if '-' in row[0] and not row[0].endswith(':'):\n"
        "            path = row[5] if len(row) > 5 else ''\n"
        "        elif row[0] == 'Private_Dirty:' and path.startswith('/'):\n"
        "            total += int(row[1]) << 10\n"
        "    return total\n"
        "from page_primer.apply.mlocks import Mlocks, _core\n"
        "lock, log = Mlocks.make_again, []\n"
        "def counted(self):\n"
        # Once without the system calls: what runs Python writes to its own static objects.
        "    plain, _core.lock = _core.lock, lambda *_: None\n"
        "    dirty(); lock(self); self._process = (0, 0)\n"
        "    _core.lock = plain\n"
        "    before = dirty(); result = lock(self); log.append((before, dirty()))\n"
        "    return result\n"
        "Mlocks.make_again = counted\n"
        "def post_fork(server, worker):\n"
        "    log.clear(); ours.post_fork(server, worker)\n"
        "    worker.log.info('private dirty %d %d', *log[0])\n"
        "post_worker_init = ours.post_worker_init\n"
    )
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    options = ("--workers", str(workers))
    with Gunicorn(python, tmp_path, *options, conf=str(conf), env=env) as server:
        server.wait_for_workers(workers)
        wait_for(lambda: server.log().count("private dirty") == workers, "every worker")
        rows = [line.split()[-2:] for line in server.log().splitlines() if "private dirty" in line]
        for before, after in ((int(a), int(b)) for a, b in rows):
            assert after - before <= 64 << 10
        for pid in server.workers:
            assert outside.text_of(pid).locked
            data = [v for v in outside.smaps(pid) if "w" in v.perms and v.path.startswith("/")]
            assert any("lo" in v.flags for v in data) or not locks_fit()
            # Read-only or not, what a lock without ONFAULT copies would show here, page by page.
            clean = sum(v.end - v.start - (v.kb["Private_Dirty"] << 10) for v in data)
            assert clean > 0
        server.wait_until_each_answered()
        primed = sorted(private_dirty(pid) for pid in server.workers)
    images_off = {**env, "PAGE_PRIMER_MLOCK": "0"}
    (tmp_path / "off").mkdir()
    with Gunicorn(python, tmp_path / "off", *options, conf=str(conf), env=images_off) as server:
        server.wait_for_workers(workers)
        server.wait_until_each_answered()
        unlocked = sorted(private_dirty(pid) for pid in server.workers)
    # From outside, beside workers that locked nothing: each has answered, but not equally often.
    assert all(a - b <= 64 << 10 for a, b in zip(primed, unlocked, strict=True)), (primed, unlocked)
