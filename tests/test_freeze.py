"""Freezing before forks: real servers, whose memory is looked at from outside."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from harness import outside
from harness.celery_worker import BY_IMPORT, TASKS, Worker
from harness.gunicorn_server import Gunicorn
from harness.process import Process
from harness.servers import wait_for

from page_primer.doctor import preloaded
from page_primer.doctor.preloaded import Preloaded
from page_primer.options import Options

MIB = 1 << 20
ONLY_FREEZE = {"freeze": True, "remap": False, "mlock": False, "include": ["nothing"]}
OFF = {"PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0"}

# Forty megabytes that the collector looks at; a request, or a task, is a full collection.
KEPT = "import gc, json, os\nkept = [[str(i)] for i in range(250_000)]\n"
APP = (
    KEPT
    + """
def app(environ, start_response):
    gc.collect()
    start_response("200 OK", [("Content-Type", "application/json")])
    frozen = gc.get_freeze_count()
    return [json.dumps({"pid": os.getpid(), "frozen": frozen}).encode()]
"""
)


def private(pids):
    """Bytes that these processes have for themselves, on average."""
    found = [vma for pid in pids for vma in outside.smaps(pid)]
    return sum(v.kb["Private_Dirty"] for v in found) * 1024 // len(pids)


def resident(pid):
    """Bytes, whoever else has them: what a parent has for itself changes with its children."""
    return sum(vma.kb["Rss"] for vma in outside.smaps(pid)) * 1024


def test_freeze_once_and_again(python):
    with Process(python) as process:
        first = process.prime(**ONLY_FREEZE)
        frozen = process.run("import gc; result = gc.get_freeze_count()")
        assert first["frozen"] >= frozen > 1000
        process.run("more = [[] for _ in range(100_000)]")
        assert process.prime(**ONLY_FREEZE)["frozen"] == first["frozen"]
        assert process.run("result = gc.get_freeze_count()") <= frozen
        # What is frozen is the process's state: also where a call has more to do than the first.
        process.run("import _ctypes, _decimal")
        assert process.prime(**ONLY_FREEZE)["frozen"] == first["frozen"]
        assert process.prime(**{**ONLY_FREEZE, "freeze": False})["frozen"] == first["frozen"]
        process.run("import page_primer\npage_primer.on_process(lambda p: p.thaw())")
        assert process.run("result = gc.get_freeze_count()") == 0
        again = process.prime(**ONLY_FREEZE)
        assert again["frozen"] >= 100_000
        child = process.run(
            "import os\n"
            "del more\n"
            "before = gc.get_freeze_count()\n"
            "pid = os.fork()\n"
            "if pid == 0:\n"
            f"    page_primer.prime(**{ONLY_FREEZE!r})\n"
            "    os._exit(gc.get_freeze_count() > before)\n"
            "result = os.waitpid(pid, 0)[1]"
        )
        assert child == 0
        process.restore()
        assert process.run("result = gc.get_freeze_count()") == 0


@pytest.mark.slow
def test_gunicorn_workers_share_what_was_preloaded(python, tmp_path):
    sizes, lines = {}, {}
    for freeze in ("", "1"):
        directory = tmp_path / f"freeze{freeze}"
        directory.mkdir()
        env = {**OFF, "PAGE_PRIMER_FREEZE": freeze}
        with Gunicorn(python, directory, "--preload", "-w", "2", app=APP, env=env) as server:
            answered = set()

            def each(server=server, answered=answered):
                answered.add(json.loads(server.get())["pid"])
                return answered >= set(server.workers)

            wait_for(each, "an answer of each worker")
            sizes[freeze] = private(server.workers)
            found = [text for pid, text in server.lines("INFO") if pid == server.master]
            lines[freeze] = [text for text in found if "PAGE_PRIMER_FREEZE" in text]
            if not freeze:
                assert Preloaded(f"gunicorn (PID {server.master})", False) in preloaded.find()
                before = server.workers
                os.kill(server.master, signal.SIGHUP)
                server.wait_for_workers(2, but_not=before)
    # The lists alone, each with the collector's header; smaller since CPython 3.13.
    assert sizes[""] >= (30 if sys.version_info < (3, 13) else 18) * MIB, sizes
    assert sizes["1"] <= 0.5 * sizes[""], sizes
    (line,) = lines[""]
    assert "the application is preloaded: PAGE_PRIMER_FREEZE=1" in line
    assert lines["1"] == []


def doctor(python, directory=None, **env):
    """What the doctor says of preloading."""
    env = {**os.environ, "PAGE_PRIMER_REMAP": "0", "PAGE_PRIMER_MLOCK": "0", **env}
    done = subprocess.run(
        [python, "-m", "page_primer", "doctor", "--json"],
        cwd=directory, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = [c for c in json.loads(done.stdout)["checks"] if c["name"] == "preloading"]
    return found[0] if found else None


@pytest.mark.slow
def test_reforks_leave_nothing_in_gunicorns_master(python, tmp_path):
    """Each request is a worker's last."""
    env = {**OFF, "PAGE_PRIMER_FREEZE": "1"}
    options = ("--preload", "--max-requests", "1", "-w", "1")
    with Gunicorn(python, tmp_path, *options, app=APP, env=env) as server:
        master = server.master
        answers = [answer_of_a_new_worker(server, set()) for _ in range(3)]
        seen = {answer["pid"] for answer in answers}
        before = resident(master), len(outside.smaps(master)), descriptors(master)
        for _ in range(20):
            answers.append(answer_of_a_new_worker(server, seen))
            seen.add(answers[-1]["pid"])
        assert len({answer["frozen"] for answer in answers}) == 1
        assert answers[0]["frozen"] >= 250_000
        after = resident(master), len(outside.smaps(master)), descriptors(master)
        # The first forks take a megabyte, then it is the same to the page (benchmarks/heap.py).
        assert after[0] <= before[0] + 3 * MIB, (before, after)
        assert after[1] <= before[1] + 6, (before, after)
        assert after[2] <= before[2] + 1, (before, after)  # the one that a worker is watched by


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def answer_of_a_new_worker(server, seen):
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            answer = json.loads(server.get())
        except (OSError, ValueError):  # of a worker that is about to go
            continue
        if answer["pid"] not in seen:
            return answer
    raise AssertionError(server.log())


HOLD = (
    KEPT
    + TASKS
    + """
@app.task
def collect(directory=None):
    gc.collect()
    if directory:
        open(f"{directory}/{os.getpid()}", "w").close()
        end = time.monotonic() + 120
        while not os.path.exists(f"{directory}/go") and time.monotonic() < end:
            time.sleep(0.05)
    return [os.getpid(), gc.get_freeze_count()]
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_celerys_children_share_what_their_parent_loaded(tmp_path, broker, images, freeze):
    options = {**({"freeze": True} if freeze else {}), "remap": False, "mlock": False}
    configure = BY_IMPORT + f"app.conf.page_primer = {options!r}\n"
    # A child for every task: 20 of them are forked anew.
    many = ("-c", "2", "--max-tasks-per-child", "1")
    with Worker(tmp_path, broker, images, *many, configure=configure, tasks=HOLD) as worker:
        held = tmp_path / "held"
        held.mkdir()
        worker.call(f"[work.collect.delay({str(held)!r}).id for _ in range(2)]")
        wait_for(lambda: len(os.listdir(held)) == 2, "both children")
        size = private([int(name) for name in os.listdir(held)])
        (held / "go").touch()
        suggested = [line for line in worker.lines("INFO") if "PAGE_PRIMER_FREEZE=1" in line]
        if not freeze:
            assert size >= 30 * MIB
            (line,) = suggested
            assert "the pool is forked from what is loaded here" in line
            return
        assert size <= 20 * MIB
        assert suggested == []
        twenty = "[r.get(timeout=120) for r in [work.collect.delay() for _ in range(20)]]"
        before = resident(worker.pid)
        answers = worker.call(twenty)
        assert len({pid for pid, _ in answers}) == 20
        assert {frozen for _, frozen in answers} == {answers[0][1]}
        assert answers[0][1] >= 250_000
        assert resident(worker.pid) <= before + 4 * MIB  # its own 20 tasks' messages are of it


def test_the_doctor_looks_for_a_preloaded_application(python, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text("workers = 2\npreload_app = True\n")
    found = doctor(python, tmp_path)
    assert found["status"] == "info"
    assert f"{tmp_path}/gunicorn.conf.py" in found["found"]
    assert found["fix"].startswith("PAGE_PRIMER_FREEZE=1")
    shutil.rmtree(tmp_path)


def configured(command=(), environ=None, directory="/nonexistent"):
    return preloaded.configured(command, environ or {}, directory)


def test_what_says_that_gunicorn_preloads(tmp_path):
    assert configured() is None
    assert configured(["gunicorn", "--preload", "app"]) == "--preload"
    named = {"GUNICORN_CMD_ARGS": "--workers 2 --preload"}
    assert configured([], named) == "GUNICORN_CMD_ARGS"
    assert configured([], {"GUNICORN_CMD_ARGS": "--bind 'a"}) is None
    own = tmp_path / "own.py"
    own.write_text("import os\npreload_app = bool(os.environ.get('X'))\n")
    assert configured(["gunicorn", "-c", str(own)]) == str(own)
    assert configured(["gunicorn", "-c", "python:a.b"]) is None
    assert configured([], {"PAGE_PRIMER_GUNICORN_CONF": "file:own.py"}, str(tmp_path)) == str(own)
    own.write_text("preload_app = True\npreload_app = False\n")
    assert configured(["gunicorn", "--config", str(own)]) is None
    own.write_text("preload_app = (\n")
    assert configured(["gunicorn", "-c", str(own)]) is None


def test_what_the_doctor_says_of_it():
    def said(found, **options):
        return [(c.status, c.found) for c in preloaded.judge(found, Options.load(options, {}))]

    here, running, frozen = Preloaded("a"), Preloaded("b", False), Preloaded("c", True)
    assert said([]) == []
    assert said([here, frozen], freeze=True) == [("ok", "a, c: frozen before forks")]
    ((status, text),) = said([here, running, frozen])
    assert (status, text) == ("info", "a, b: loaded before forks, not frozen")
    ((status, text),) = said([running] * 5, freeze=True)
    assert (status, text) == ("info", "b, b, b and 2 others: loaded before forks, not frozen")
    ((status, text),) = said([here], freeze=False)
    assert (status, text) == ("ok", "a: not frozen, as PAGE_PRIMER_FREEZE says")


def test_a_strangers_configuration_does_the_doctor_no_harm(tmp_path):
    """Root's doctor looks at other users' files: neither waits for them nor reads without end."""
    from page_primer.doctor.preloaded import configured

    conf = tmp_path / "gunicorn.conf.py"
    os.mkfifo(conf)
    assert configured(["gunicorn"], {}, str(tmp_path)) is None
    assert configured(["gunicorn", "-c", "/dev/zero"], {}, str(tmp_path)) is None
    conf.unlink()
    conf.write_text("preload_app = " + "-" * 100_000 + "1\n")
    assert configured(["gunicorn"], {}, str(tmp_path)) is None
    conf.write_text("preload_app = True\n")
    assert configured(["gunicorn"], {}, str(tmp_path)) == str(conf)
