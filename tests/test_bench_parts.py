"""Parts of `page-primer bench`: load, the process tree, counters, aligned interpreters."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from harness.interpreters import KINDS
from harness.privileges import drop_memlock, locks_fit
from harness.schemas import validated
from harness.servers import Server, free_port, wait_for

from page_primer.align import files as align
from page_primer.align import targets
from page_primer.bench import load
from page_primer.bench.failures import CutShort, Failure
from page_primer.bench.interpreter import Copy, start_of
from page_primer.bench.measure import _turns

SERVER = str(Path(__file__).parent / "harness" / "benchserver.py")
BENCH = [sys.executable, "-m", "page_primer", "bench"]


def program(text, *arguments, environ=None):
    """Run a program of its own: being a subreaper is a property of a process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True,
        timeout=600, env=environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_interrupt_that_a_fork_hook_swallows_is_not_lost():
    """As CPython does with what a signal handler raises there."""
    said = program("""
        import os, signal
        from page_primer.bench.command import _interrupted_by_signals
        with _interrupted_by_signals() as check:
            check()
            os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGTERM))
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
            print("swallowed")
            try:
                check()
            except KeyboardInterrupt:
                print("interrupted")
    """)
    assert said == "swallowed\ninterrupted\n"


# --- load -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [load.H2LOAD, load.AIOHTTP])
def test_load_generators(tmp_path, name):
    """Both send exactly what they are asked for, to each URL in turn, and notice every error."""
    if name == load.H2LOAD and not shutil.which(name):
        pytest.skip("h2load is not installed")
    port, helpers = free_port(), set()
    with Server(tmp_path, port, sys.executable, SERVER, str(port), "counts") as server:
        urls = [f"http://127.0.0.1:{port}{path}" for path in ("/", "/other?a=b")]

        def answered():
            return server.log().count("answered")

        wait_for(lambda: answered() == 1, "the fixture's own request")
        found = load.send(name, urls, 61, 4, helpers)
        wait_for(lambda: answered() == 62, "the last line")
        assert len(found.latencies) == 61
        assert 0 < found.latencies[0] <= found.quantile(0.5) <= found.quantile(0.99)
        assert found.quantile(1.0) == found.latencies[-1] <= found.seconds
        assert found.rate == pytest.approx(61 / found.seconds)
        load.send(name, urls, 1, 8, helpers)  # fewer requests than connections
        with pytest.raises(CutShort, match=r"1\d of 30 requests failed \(status 404\)"):
            load.send(name, [urls[0], f"http://127.0.0.1:{port}/missing"], 30, 2, helpers)
    with pytest.raises(CutShort, match="failed"):
        load.send(name, urls, 10, 2, helpers)
    assert helpers == set()


def test_no_load_generator(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert load.generator() == load.AIOHTTP
    monkeypatch.setattr(load, "AIOHTTP", "a_module_that_does_not_exist")
    with pytest.raises(Failure, match="no load generator: install h2load"):
        load.generator()


def test_requests_are_divided_into_turns():
    assert _turns(2000, 8, 1000.0) == [200] * 10
    assert _turns(2000, 8, 1e6) == [496, 504, 496, 504]  # several, however fast it is
    assert _turns(10, 4, 1.0) == [4, 6]  # every connection is used alike, but for the rest
    assert _turns(3, 8, 1.0) == [3]
    assert sum(_turns(1001, 8, 777.0)) == 1001
    assert all(number % 16 == 0 for number in _turns(1600, 16, 10.0))  # of two URLs


# --- the process tree -----------------------------------------------------------------------------


def test_processor_time_and_faults_of_a_tree():
    """Of live processes, of threads that have ended, of children that were waited for, of orphans
    and of zombies: half a second in sum, of which none is lost."""
    out = program("""
        import json, os, subprocess, sys, time
        from page_primer.bench.tree import Adopted, workers
        spin = "import time, threading\\nend = time.process_time() + 0.1\\n"
        spin += "while time.process_time() < end: pass\\n"
        tree = Adopted()
        parent = '''
        import os, sys, subprocess, threading, time
        def spin():
            end = time.thread_time() + 0.1
            while time.thread_time() < end:
                pass
        def child(then):
            pid = os.fork()
            if not pid:
                spin()
                then()
                os._exit(0)
            return pid
        sys.stdin.readline()
        spin()
        thread = threading.Thread(target=spin)
        thread.start(); thread.join()
        os.waitpid(child(lambda: None), 0)
        child(lambda: None)                      # a zombie
        orphan = child(lambda: os.fork() or (spin(), time.sleep(60)))
        os.waitpid(orphan, 0)                    # 0.1 s, and its child 0.1 s more
        time.sleep(1)
        print("done", flush=True)
        time.sleep(60)
        '''
        import textwrap
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        tree.settle()
        before = tree.used()
        process.stdin.write("go\\n"); process.stdin.flush()
        process.stdout.readline()
        tree.settle()
        after = tree.used()
        found = len(tree.processes()), len(workers(after - before))
        tree.stop(5)
        print(json.dumps([after.seconds - before.seconds, after.minor_faults - before.minor_faults,
                          *found, len(tree.processes())]))
        """)
    seconds, faults, processes, working, left = json.loads(out.splitlines()[-1])
    assert 0.59 <= seconds < 3
    assert faults > 100
    assert processes == 3  # the parent, its zombie, and the orphan
    assert working == 3
    assert left == 0


def test_one_server_of_several():
    """By its session: what it leaves to this process is its own, another's is not."""
    out = program("""
        import subprocess
        from page_primer.bench.tree import Adopted
        tree = Adopted()
        leaves = ["sh", "-c", "(sleep 60 & echo $!) & wait"]
        both = [subprocess.Popen(leaves, stdout=subprocess.PIPE, text=True, start_new_session=True)
                for _ in "ab"]
        orphans = [int(process.stdout.readline()) for process in both]
        one, other = (tree.only(process.pid) for process in both)
        for process in both:
            process.wait()
        print(one.processes() == orphans[:1], other.processes() == orphans[1:])
        one.stop()
        print(one.processes() == [], tree.processes() == orphans[1:])
        other.stop()
        print(tree.processes() == [])
        """)
    assert out.split() == ["True"] * 5


def test_a_helper_is_no_part_of_the_tree():
    out = program("""
        import subprocess
        from page_primer.bench.tree import Adopted
        tree = Adopted()
        helper = subprocess.Popen(["sleep", "60"])
        tree.helpers.add(helper.pid)
        other = subprocess.Popen(["sleep", "60"])
        print(tree.processes() == [other.pid])
        tree.stop()
        print(other.poll() is not None, helper.poll() is None)
        helper.kill()
        """)
    assert out.split() == ["True", "True", "True"]


# --- counters -------------------------------------------------------------------------------------


def test_counters_follow_threads_and_children():
    """By software events, which the kernel counts on every machine, in the way of hardware's."""
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) > 2 and os.geteuid():
        pytest.skip("kernel.perf_event_paranoid is above 2")
    out = program("""
        import json, subprocess, sys
        from page_primer.bench.counters import Attached
        software, faults = 1, 2
        child = '''
        import mmap, os, sys, threading
        def touch(pages):
            area = mmap.mmap(-1, pages * 4096, mmap.MAP_PRIVATE)
            area.madvise(mmap.MADV_NOHUGEPAGE)
            for page in range(pages):
                area[page * 4096] = 1
        print("ready", flush=True)
        sys.stdin.readline()
        touch(1000)
        thread = threading.Thread(target=touch, args=(2000,))
        thread.start(); thread.join()
        if not (pid := os.fork()):
            touch(4000)
            os._exit(0)
        os.waitpid(pid, 0)
        print("done", flush=True)
        sys.stdin.readline()
        '''
        import textwrap
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(child)], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process.stdout.readline()
        with Attached({"faults": (software, faults)}, [process.pid]) as attached:
            before = attached.read()
            process.stdin.write("go\\n"); process.stdin.flush()
            process.stdout.readline()
            after = attached.read()
        process.kill()
        print(json.dumps([before.get("faults", 0), after["faults"]]))
        """)
    before, after = json.loads(out)
    assert 7000 <= after - before < 9000


def test_counters_that_are_missing_are_named():
    out = program("""
        import errno
        from page_primer.bench import counters
        found = counters.available()
        print(bool(found.events) != bool(found.missing))
        for number in (errno.EACCES, errno.ENOENT, errno.ENOSYS):
            print(counters._why(OSError(number, "told")))
        """).splitlines()
    assert out[0] == "True"
    assert "perf_event_paranoid" in out[1]
    assert "this machine has none" in out[2]
    assert out[3] == "no hardware counters: told"


def test_pointer_chase():
    from page_primer.bench._probe import pointer_chase

    assert 0 < pointer_chase(512, False, 1000) < 1e6
    assert 0 < pointer_chase(512, True, 1000) < 1e6
    for wrong in ((1, False, 1), (512, False, 0), (1 << 40, False, 1)):
        with pytest.raises(ValueError, match="out of range"):
            pointer_chase(*wrong)


# --- aligned interpreters -------------------------------------------------------------------------

ASK = "import json, sys; print(json.dumps([sys.path, open('/proc/self/maps').read()]))"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_aligned_copy(tmp_path, kind):
    """An interpreter, and a script of a virtual environment, run on an aligned copy with the same
    packages; no file of theirs is touched."""
    python = KINDS[kind]
    home = tmp_path / "venv"
    (home / "bin").mkdir(parents=True)
    original = targets.interpreter(python)
    (home / "bin/python").symlink_to(python)
    name = subprocess.run([python, "-c", "import sys; print('python%d.%d' % sys.version_info[:2])"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    packages = home / "lib" / name / "site-packages"
    packages.mkdir(parents=True)
    (packages / "only_here.py").write_text("")
    base = os.path.dirname(os.path.realpath(python))
    (home / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
    script = home / "bin/server"
    script.write_text(f"#!{home}/bin/python -B\nimport only_here\n{ASK}\n")
    script.chmod(0o755)
    before = hashlib.sha256(Path(original.code).read_bytes()).digest(), sorted(home.rglob("*"))
    for command in ([str(script), "argument"], [f"{home}/bin/python", "-c", ASK]):
        with Copy(command, os.environ) as copy:
            out = subprocess.run(copy.command, env={**os.environ, **copy.environment}, text=True,
                                 capture_output=True, check=True).stdout  # fmt: skip
            path, maps = json.loads(out)
            assert str(packages) in {os.path.realpath(place) for place in path}
            lines = [line.split(None, 5) for line in maps.splitlines() if " r-xp " in line]
            loaded = {words[5] for words in lines if len(words) > 5}
            (place,) = {name for name in loaded if "/page-primer-bench-" in name}
            assert align.look(place).state == align.ALIGNED
            assert original.code not in loaded
        assert not os.path.exists(place)
    assert before == (
        hashlib.sha256(Path(original.code).read_bytes()).digest(), sorted(home.rglob("*"))
    )  # fmt: skip


def test_how_a_command_is_started(tmp_path):
    def script(first):
        path = tmp_path / "script"
        path.write_text(f"{first}\n")
        path.chmod(0o755)
        return [str(path), "x"]

    python = sys.executable
    assert start_of([python, "-m", "x"], os.environ).rest == ("-m", "x")
    found = start_of(script(f"#!{python} -I"), os.environ)
    assert (found.python, found.options, found.rest[1:]) == (python, ("-I",), ("x",))
    long = f"#!/bin/sh\n'''exec' \"{python}\" \"$0\" \"$@\"\n' '''"
    assert start_of(script(long), os.environ).python == python
    environ = {"PATH": os.path.dirname(python)}
    named = os.path.basename(python)
    assert start_of(script(f"#!/usr/bin/env {named}"), environ).python == python
    with pytest.raises(
        Failure, match=r"is run by /bin/bash, not by a Python; .*`python -m script`"
    ):
        start_of(script("#!/bin/bash"), os.environ)
    with pytest.raises(Failure, match="is run by nothing, not by a Python"):
        start_of(script("#!"), os.environ)
    with pytest.raises(Failure, match="command not found"):
        start_of(["no-such-server"], os.environ)


# --- kinds of work --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script(tmp_path):
    """Its processor time has that of the children it waited for."""
    text = (
        "import subprocess, sys, os, time\n"
        "if len(sys.argv) > 1:\n"
        "    subprocess.run([sys.executable, __file__], check=True)\n"
        "end = time.process_time() + 0.1\n"
        "while time.process_time() < end: pass\n"
        "sys.exit(os.environ.get('PAGE_PRIMER_EXCLUDE') == 'wrong')\n"
    )
    (tmp_path / "script.py").write_text(text)
    result = tmp_path / "result.json"

    def bench(*words):
        return subprocess.run(
            [*BENCH, "--command", *words, "--", sys.executable, "script.py", "{port}"],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(tmp_path)},
        )  # fmt: skip

    done = bench("--rounds", "2", "--variants", "off,mlock", "--json", str(result))
    assert done.returncode == 0, done.stderr
    written = validated("bench", json.loads(result.read_text()))
    assert not written["side_by_side"]  # a script's word is its own
    found = written["variants"]["off"]["medians"]
    assert found["cpu_ms"] >= 200
    assert found["wall_ms"] >= 200
    assert found["resident_mib"] > 4
    done = bench("--variants", "off,mine:exclude=wrong")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"page-primer: bench: mine: {sys.executable} ended with status 1: ")


SCRIPT = (
    "import os, signal, subprocess, sys, time\n"
    "def end(*_):\n"
    "    open(f'told-{os.getpid()}', 'w').close()\n"
    "    os._exit(1)\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "if sys.argv[2:]:\n"
    "    child = [sys.executable, __file__, sys.argv[1]]\n"
    "    sys.exit(subprocess.run(child, start_new_session=True).returncode)\n"
    "open(f'began-{os.getpid()}', 'w').close()\n"
    "seen = []\n"
    "while time.process_time() < 0.7:\n"
    "    seen.append(time.monotonic())\n"
    "open(f'seen-{os.getpid()}', 'w').write(' '.join(map(str, seen)))\n"
    "sys.exit(os.environ.get('PAGE_PRIMER_EXCLUDE') == 'wrong')\n"
)


class Scripts:
    """Runs of the command on a script of its own, side by side; the script has a mark."""

    def __init__(self, tmp_path):
        (tmp_path / "script.py").write_text(SCRIPT)
        self.mark = f"mark-{free_port()}"
        environ = {**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(tmp_path)}
        self.how = {"cwd": tmp_path, "env": environ, "text": True}

    def command(self, *words, child=True):
        return [*BENCH, "--command", "--side-by-side", *words, "--", sys.executable, "script.py",
                self.mark, *(["has a child in a session of its own"] if child else [])]  # fmt: skip

    def run(self, *words):
        return subprocess.run(self.command(*words), capture_output=True, timeout=600, **self.how)

    def after_a_round(self, *, child):
        """One that has finished its first round."""
        process = subprocess.Popen(
            self.command("--rounds", "1000", child=child), stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, **self.how,
            # What runs the tests may ignore it (a job in the background), and then we would.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        for line in process.stderr:
            if line.startswith("round 1"):
                break
        return process

    def left(self):
        found = subprocess.run(["pgrep", "-f", self.mark], capture_output=True, text=True)
        return found.stdout.split()


@pytest.mark.slow
def test_scripts_side_by_side(tmp_path):
    """Each works while the others are stopped, its child in a session of its own, too."""
    scripts, result = Scripts(tmp_path), tmp_path / "result.json"
    done = scripts.run("--rounds", "1", "--variants", "off,off2", "--json", str(result))
    assert done.returncode == 0, done.stderr
    found = validated("bench", json.loads(result.read_text()))
    assert found["side_by_side"]
    (measured,) = found["rounds"]
    assert all(one["cpu_ms"] >= 700 and "wall_ms" not in one for one in measured.values())
    *_, first, second = sorted(tmp_path.glob("seen-*"), key=os.path.getmtime)
    seen = [list(map(float, path.read_text().split())) for path in (first, second)]
    owners = [owner for _, owner in sorted((at, owner) for owner in (0, 1) for at in seen[owner])]
    turns = [owner for owner, _ in itertools.groupby(owners)]
    assert 4 <= len(turns) <= 30, len(turns)  # of 0.2 s: seven, or more where others are busy


@pytest.mark.slow
def test_no_script_is_left(tmp_path):
    """Where one fails, on Ctrl-C, or where bench is killed."""
    scripts = Scripts(tmp_path)
    done = scripts.run("--variants", "off,mine:exclude=wrong")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"page-primer: bench: mine: {sys.executable} ended with status 1"
    )
    process = scripts.after_a_round(child=True)
    began = len(list(tmp_path.glob("began-*")))
    wait_for(lambda: len(list(tmp_path.glob("began-*"))) > began, "the second round")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == 130
    assert not scripts.left()
    # By SIGTERM, which those that are stopped get as well.
    assert list(tmp_path.glob("told-*"))
    killed = scripts.after_a_round(child=False)
    wait_for(lambda: len(scripts.left()) > 2, "bench and two scripts")
    killed.kill()
    killed.communicate()
    wait_for(lambda: not scripts.left(), "the end of stopped scripts")


@pytest.mark.slow
def test_celery_tasks(tmp_path, broker):
    (tmp_path / "work.py").write_text(
        "import atexit, os, sys\nfrom celery import Celery\n"
        "atexit.register(print, 'words at the end', file=sys.stderr)\n"
        "app = Celery('work', broker=os.environ['BROKER'])\n"
        "@app.task\ndef add(a, b):\n    return a + b\n"
        "@app.task\ndef fail():\n    raise ValueError('no such luck')\n"
    )
    result = tmp_path / "result.json"

    def bench(*words, **environ):
        command = [sys.executable, "-m", "celery", "-A", "work", "worker", "-c", "2"]
        return subprocess.run(
            [*BENCH, "--variants", "off,mlock", "--rounds", "1", "--requests", "40", "--json",
             str(result), "--celery-task", *words, "--", *command],
            cwd=tmp_path, capture_output=True, text=True, timeout=600,
            env={**os.environ, "BROKER": f"{broker}/9", "C_FORCE_ROOT": "1", **environ},
        )  # fmt: skip

    results = {"CELERY_RESULT_BACKEND": f"{broker}/9"}
    done = bench("work.add", "1", "2", **results)
    assert done.returncode == 0, done.stderr
    assert "processor ms a task" in done.stdout
    found = validated("bench", json.loads(result.read_text()))["variants"]["off"]["medians"]
    assert found["cpu_ms"] > 0
    assert 0 < found["p50_ms"] <= found["max_ms"]
    assert found["workers"] >= 2
    done = bench("work.fail", **results)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "page-primer: bench: off: work.fail: ValueError: no such luck"
    )
    done = bench("work.add", "1", "2")
    assert done.returncode == 1
    assert "has no result backend" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_celery_workers_side_by_side(tmp_path, broker):
    """Each has a queue of its own, of which nothing is left with the broker."""
    (tmp_path / "work.py").write_text(
        "import os\nfrom celery import Celery\n"
        "app = Celery('work', broker=os.environ['BROKER'], backend=os.environ['BROKER'])\n"
        "@app.task\ndef add(a, b):\n    return a + b\n"
    )
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "celery", "-A", "work", "worker", "-c", "2"]
    done = subprocess.run(
        [*BENCH, "--variants", "off,mlock", "--rounds", "2", "--requests", "40", "--json",
         str(result), "--celery-task", "work.add", "1", "2", "--", *command, "-Q", "{queue}", "-n",
         "{queue}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**os.environ, "BROKER": f"{broker}/8", "C_FORCE_ROOT": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = validated("bench", json.loads(result.read_text()))
    assert found["side_by_side"]
    for name in ("off", "mlock"):
        assert all(one[name]["cpu_ms"] > 0 for one in found["rounds"])
        assert found["variants"][name]["medians"]["workers"] >= 2
    port = broker.rpartition(":")[2]
    keys = subprocess.run(
        ["redis-cli", "-p", port, "-n", "8", "--raw", "KEYS", "*page-primer*"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert keys.split() == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("vmtouch"), reason="vmtouch is not installed")
@pytest.mark.parametrize("limit", [None, 8192])
def test_vmtouch(tmp_path, limit):
    """As a peer; or not, where RLIMIT_MEMLOCK does not allow it."""
    if not limit and not locks_fit():
        pytest.skip("RLIMIT_MEMLOCK holds here")
    port = free_port()
    done = subprocess.run(
        [*(drop_memlock(limit) if limit else ()), *BENCH, "--url", f"http://127.0.0.1:{port}/",
         "--variants", "off,vmtouch", "--rounds", "1",
         "--requests", "20", "--", sys.executable, SERVER, str(port)],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if limit:
        assert done.returncode == 1
        assert re.search(r"^page-primer: bench: vmtouch: FATAL: mlock: ", done.stderr, re.MULTILINE)
    else:
        assert done.returncode == 0, done.stderr
        assert "vmtouch: no verdict: 1 of the 6 rounds" in done.stdout
    running = subprocess.run(["pgrep", "-x", "vmtouch"], capture_output=True, text=True).stdout
    for pid in running.split():
        with contextlib.suppress(OSError):
            assert str(port) not in Path(f"/proc/{pid}/environ").read_text()
