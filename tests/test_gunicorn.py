"""A real gunicorn, primed by one option; every claim is checked from outside in smaps."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest
from harness import outside
from harness.gunicorn_server import APP, CONF, FROZEN, Gunicorn, require_no_failure
from harness.interpreters import BASE, python_of
from harness.launched import is_primed
from harness.privileges import IS_ROOT, has_images
from harness.servers import check, children, wait_for


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_every_process_is_huge_and_locked(every_python, images, tmp_path, preload):
    # Not to freeze is a decision, so there is no line that suggests it.
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER_FREEZE": "0"}
    (tmp_path / "gunicorn.conf.py").write_text(FROZEN)
    with Gunicorn(every_python, tmp_path, "--workers", "4", *preload, env=env) as server:
        server.wait_for_workers(4)
        family = [server.master, *server.workers]
        assert len(family) == 5
        texts = check(family)

        # One copy for all of them.
        outside.require_one_copy(texts)

        # Not even what seeds a worker's random numbers comes after the fork.
        if preload:
            master, *workers = ({v.path for v in outside.smaps(pid)} for pid in family)
            assert [paths - master for paths in workers] == [set()] * 4

        # One line at INFO, of the master; a worker says only what differs.
        ((pid, message),) = server.lines("INFO")
        assert pid == server.master
        assert "of code on huge pages" in message
        assert "locked" in message
        assert {pid for pid, _ in server.lines("DEBUG")} >= set(server.workers)

        # HUP: new workers of the same master.
        old = server.workers
        os.kill(server.master, signal.SIGHUP)
        server.wait_for_workers(4, but_not=old)
        check([server.master, *server.workers])

        # USR2: a new master by exec, then the old one is told to go.
        first = server.master
        os.kill(first, signal.SIGUSR2)
        wait_for(lambda: int((tmp_path / "gunicorn.pid.2").read_text()), "a new master")
        second = int((tmp_path / "gunicorn.pid.2").read_text())
        wait_for(lambda: len(children(second)) == 4, "the new master's workers")
        wait_for(lambda: all(outside.text_of(pid).locked for pid in children(second)), "locks")
        texts = check([second, *children(second), first])
        outside.require_one_image(texts)
        os.kill(first, signal.SIGQUIT)
        server.process.wait(20)
        wait_for(lambda: server.master == second, "the new master's pid file")
        server.wait_for_workers(4)
        check([second, *server.workers])
        require_no_failure(server)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_re_forks(every_python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    options = ["--workers", "2", "--max-requests", "2"]
    (tmp_path / "gunicorn.conf.py").write_text(FROZEN)
    with Gunicorn(every_python, tmp_path, *options, env=env) as server:
        seen = set()
        end = time.monotonic() + 800  # a busy machine has taken two minutes
        while len(seen) < 202 and time.monotonic() < end:
            seen.add(server.get())
        assert len(seen) >= 202
        # Without further requests, each of which brings a worker nearer to its end.
        server.wait_until_settled(2)
        texts = check([server.master, *server.workers])
        outside.require_one_copy(texts)
        assert len(server.lines("INFO")) == 1
        require_no_failure(server)


@pytest.mark.slow
@pytest.mark.images
def test_unrelated_server_maps_the_same_image(python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with Gunicorn(python, tmp_path / "a", env=env) as one:
        check([one.master])
        with Gunicorn(python, tmp_path / "b", env=env) as two:
            family = [one.master, *one.workers, two.master, *two.workers]
            texts = check(family)
            outside.require_one_copy(texts)


def is_handled(pid, path):
    """Whether a late library is moved, or locked, where at a random address none of it is hot."""
    text = outside.text_of(pid, path)
    return text.huge or (text.phase and text.locked)


@pytest.mark.slow
@pytest.mark.parametrize("worker_class", ["sync", "gthread"])
def test_late_library_of_an_unpreloaded_app(python, images, tmp_path, worker_class):
    app = "import ssl\n" + APP
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    conf = "threads = 4\n"
    (tmp_path / "gunicorn.conf.py").write_text(conf)
    with Gunicorn(
        python, tmp_path, "--workers", "2", "--worker-class", worker_class, env=env, app=app
    ) as server:
        server.wait_for_workers(2)
        check([server.master, *server.workers])
        for pid in server.workers:
            paths = {v.path for v in outside.smaps(pid) if "libcrypto" in v.path and "w" in v.perms}
            if not paths:
                pytest.skip("this interpreter has no libcrypto of its own to load")
            (path,) = paths
            wait_for(lambda pid=pid, path=path: is_handled(pid, path), "libcrypto")
            outside.text_of(pid, path).require_libcrypto_moved()


@pytest.mark.slow
def test_the_users_own_configuration_is_not_hidden(python, images, tmp_path):
    (tmp_path / "helper.py").write_text(
        "def reloaded(server): server.log.info('their on_reload')\n"
    )
    (tmp_path / "gunicorn.conf.py").write_text(
        textwrap.dedent("""
        import os
        workers = 3
        proc_name = "theirs"
        def on_starting(server): server.log.info("their on_starting")
        def post_fork(server, worker): worker.log.info("their post_fork")
        def post_worker_init(worker): worker.log.info("their post_worker_init")
        on_reload = "helper.reloaded"
        """)
    )
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONPATH": str(tmp_path)}
    with Gunicorn(python, tmp_path, env=env) as server:
        server.wait_for_workers(3)
        check([server.master, *server.workers])
        log = server.log()
        assert log.index("their on_starting") < log.index("page-primer: ")
        assert log.count("their post_fork") == 3
        assert log.count("their post_worker_init") == 3
        # A reload reads their file anew, every time.
        for workers in (1, 2):
            text = (tmp_path / "gunicorn.conf.py").read_text()
            # Of another size, too: within a second, Python would not see that it is another file.
            text = re.sub(r"workers = \d", f"workers = {workers}", text) + "#\n"
            (tmp_path / "gunicorn.conf.py").write_text(text)
            old = server.workers
            os.kill(server.master, signal.SIGHUP)
            server.wait_for_workers(workers, but_not=old)
            assert server.log().count("their on_reload") == workers
        check([server.master, *server.workers])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["path", "file:", "python:"])
def test_configuration_named_by_variable(python, images, tmp_path, form):
    (tmp_path / "theirs.py").write_text("workers = 2\n_private = 1\n")
    value = {"path": "theirs.py", "file:": f"file:{tmp_path}/theirs.py", "python:": "python:theirs"}
    env = {
        "PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER_GUNICORN_CONF": value[form],
        "PYTHONPATH": str(tmp_path),
    }  # fmt: skip
    with Gunicorn(python, tmp_path, env=env) as server:
        server.wait_for_workers(2)
        check([server.master, *server.workers])


COLLECTIONS = """
import gc, sys
seen = []
def note(phase, info):
    if phase == "stop" and sys._getframe(1).f_code.co_name == "collect_if_small":
        seen.append(info["generation"])
gc.callbacks.append(note)
"""
SHOWS_COLLECTIONS = """
import gc
(note,) = (one for one in gc.callbacks if one.__name__ == "note")
def app(environ, start_response):
    start_response("200 OK", [])
    return [str(note.__globals__["seen"]).encode()]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preload", "env", "seen"),
    [(False, {}, "[2, 2]"), (True, {}, "[]"), (False, {"PAGE_PRIMER": "0"}, "[]")],
)
def test_the_master_collects_so_that_no_worker_has_to(python, images, tmp_path, preload, env, seen):
    """A full collection copies what a worker has inherited. A preloaded application is for `freeze`
    to collect; and where nothing is done, nothing is collected."""
    (tmp_path / "gunicorn.conf.py").write_text(COLLECTIONS)
    options = ["--preload"] if preload else []
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), **env}
    with Gunicorn(python, tmp_path, *options, env=env, app=SHOWS_COLLECTIONS) as server:
        assert server.get().decode() == seen


RELOADED = """
import gc, json
from gunicorn.app.base import Application
from gunicorn.arbiter import Arbiter
from page_primer.integrations import gunicorn as hooks
from page_primer import family

class Served(Application):
    def init(self, parser, opts, args):
        return {"workers": 2}

collections = []
gc.callbacks.append(lambda phase, info: collections.append(info["generation"] == 2))
gc.set_threshold(0)
arbiter = Arbiter(Served())
hooks.on_starting(arbiter)
counted, seen = [family.size()], [any(collections)]
collections.clear()
large = [[] for _ in range(400_000)]
arbiter.cfg.set("workers", 32)
arbiter.setup(arbiter.app)
hooks.on_reload(arbiter)
print(json.dumps([[*counted, family.size()], [*seen, any(collections)]]))
"""


def test_a_reload_counts_workers_anew_and_a_large_master_collects_nothing(python, images):
    """An arbiter that is not started: its hooks are called as it does."""
    done = subprocess.run(
        [python, "-c", RELOADED], capture_output=True, text=True,
        env={**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[3, 33], [True, False]], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gunicorn.conf.py", "other.py"])
def test_star_import_in_the_users_own_file(python, images, tmp_path, name):
    (tmp_path / name).write_text(
        "from page_primer.integrations.gunicorn_conf import *\nworkers = 2\n"
    )
    if name == "other.py":  # a file that gunicorn would not read must not be read by us
        (tmp_path / "gunicorn.conf.py").write_text("workers = 3\n")
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(python, tmp_path, conf=name if name == "other.py" else None, env=env) as server:
        server.wait_for_workers(2)
        check([server.master, *server.workers])
        old = server.workers
        os.kill(server.master, signal.SIGHUP)
        server.wait_for_workers(2, but_not=old)
        check([server.master, *server.workers])


def test_path_form(python, images, tmp_path):
    path = subprocess.run(
        [python, "-m", "page_primer.integrations.gunicorn_conf"], capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / "gunicorn.conf.py").write_text("workers = 2\n")
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(python, tmp_path, conf=path, env=env) as server:
        server.wait_for_workers(2)
        check([server.master, *server.workers])


def test_check_config_primes_nothing(python, images, tmp_path):
    (tmp_path / "served.py").write_text(APP)
    env = {**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images)}
    done = subprocess.run(
        [python, "-m", "gunicorn", "--check-config", "-c", CONF, "served:app"],
        cwd=tmp_path, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not images.exists()


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PAGE_PRIMER_LIMIT": "lots"}, "page-primer: PAGE_PRIMER_LIMIT must be a number of bytes"),
        ({"PAGE_PRIMER_GUNICORN_CONF": "/none/such.py"}, "'/none/such.py', which does not exist"),
    ],
)
def test_bad_setting_stops_the_start_with_one_line(python, tmp_path, env, said):
    (tmp_path / "served.py").write_text(APP)
    done = subprocess.run(
        [python, "-m", "gunicorn", "-c", CONF, "served:app"],
        cwd=tmp_path, env={**os.environ, **env}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert said in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("def post_fork(server): pass", "invalid value for post_fork: Value must have an arity"),
        ("on_starting = 5", "invalid value for on_starting: Value is not callable: 5"),
        ("on_starting = 'none.such.hook'", "invalid value for on_starting: No module named 'none'"),
        ("workers = foo", "NameError: name 'foo' is not defined"),
        ("def", "SyntaxError"),
    ],
)
def test_mistakes_in_the_users_configuration_stop_the_start(python, tmp_path, config, said):
    (tmp_path / "served.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(config + "\n")
    done = subprocess.run(
        [python, "-m", "gunicorn", "-c", CONF, "served:app"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr
    if "invalid" not in said:
        assert f"Failed to read config file: {tmp_path}/gunicorn.conf.py" in done.stderr
        assert "line 1" in done.stderr


def test_names_of_the_users_that_are_no_settings_do_no_harm(python, images, tmp_path):
    text = "sys = os = contextlib = _gunicorn = Options = 'theirs'\nWORKERS = 2\n"
    (tmp_path / "gunicorn.conf.py").write_text(text)
    with Gunicorn(python, tmp_path, env={"PAGE_PRIMER_IMAGE_DIR": str(images)}) as server:
        server.wait_for_workers(1)
        check([server.master, *server.workers])


def test_a_bad_variable_that_comes_later_does_not_stop_the_server(python, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text("raw_env = ['PAGE_PRIMER_LIMIT=lots']\n")
    with Gunicorn(python, tmp_path) as server:
        assert server.get()
        assert "PAGE_PRIMER_LIMIT must be a number of bytes" in server.log()


def test_daemon(python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(python, tmp_path, "--daemon", "--workers", "2", env=env) as server:
        assert server.process.wait(20) == 0
        server.wait_for_workers(2)
        master = server.master
        check([master, *server.workers])
    wait_for(lambda: not os.path.exists(f"/proc/{master}"), "the daemon's end")


@pytest.fixture
def public_directory():
    """A directory that other users may enter, which pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="page-primer-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.root("drop privileges")
def test_user_and_group(python, public_directory):
    """Workers lock before they become nobody, and an application's own libraries are primed after:
    with what nobody may do, which is to use memory without a file here."""
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    if subprocess.run([*as_nobody, python, "-c", "import page_primer"]).returncode:
        pytest.skip("another user may not run this interpreter")
    env = {"HOME": "/root", "PAGE_PRIMER_IMAGE_DIR": str(public_directory / "images")}
    options = ["--user", "65534", "--group", "65534", "--workers", "2"]
    app = "import ssl\n" + APP
    with Gunicorn(python, public_directory, *options, env=env, app=app) as server:
        server.wait_for_workers(2)
        for pid in server.workers:
            # After its first hooks.
            wait_for(lambda pid=pid: Path(f"/proc/{pid}").stat().st_uid == 65534, "nobody")
        texts = check([server.master, *server.workers])
        outside.require_one_copy(texts)
        for pid in server.workers:
            paths = {v.path for v in outside.smaps(pid) if "libcrypto" in v.path and "w" in v.perms}
            for path in paths:
                wait_for(lambda pid=pid, path=path: is_handled(pid, path), "libcrypto")
        require_no_failure(server)


@pytest.mark.slow
@pytest.mark.root("drop privileges; without it the other tests run without privilege already")
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_without_any_privilege(every_python, images, tmp_path, preload):
    """Without a capability, and with the default RLIMIT_MEMLOCK."""
    wrapper = [
        "prlimit", "--memlock=8388608:8388608",
        "setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
    ]  # fmt: skip
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(
        every_python, tmp_path, "--workers", "4", *preload, env=env, wrapper=wrapper
    ) as server:
        server.wait_for_workers(4)
        texts = check([server.master, *server.workers])
        status = Path(f"/proc/{server.master}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        moved = [text for text in texts if text.attainable]
        assert all(v.path.startswith(f"{images}/") for text in moved for v in text.span_vmas)
        outside.require_one_copy(texts)


def about_locks(warnings):
    """Without images there is another: of code that is not on huge pages."""
    return [one for one in warnings if has_images() or "not locked" in one[1]]


@pytest.mark.slow
def test_default_memlock(python, images, tmp_path):
    """8 MiB: every worker has the interpreter's code locked; the log says what did not fit."""
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER_MLOCK": "1"}
    wrapper = ["prlimit", "--memlock=8388608:8388608"]
    if IS_ROOT:
        wrapper += ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]
    with Gunicorn(python, tmp_path, "--workers", "4", env=env, wrapper=wrapper) as server:
        server.wait_for_workers(4)
        check([server.master, *server.workers])
        warnings = about_locks(server.lines("WARNING"))
        assert [pid for pid, _ in warnings] == [server.master]
        assert "RLIMIT_MEMLOCK is 8.0 MiB" in warnings[0][1]
        assert "LimitMEMLOCK=" in warnings[0][1]
    server.log_file.unlink()
    env.pop("PAGE_PRIMER_MLOCK")
    with Gunicorn(python, tmp_path, env=env, wrapper=wrapper) as server:
        # Nobody asked for it by name, so the same line is no warning.
        assert about_locks(server.lines("WARNING")) == []
        assert any("RLIMIT_MEMLOCK" in message for _, message in server.lines("INFO"))


def test_off_switch(python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER": "0"}
    with Gunicorn(python, tmp_path, env=env) as server:
        assert outside.text_of(server.master).huge == 0
        assert server.lines("INFO") == [(server.master, "nothing done: switched off")]


def test_unwritable_image_directory_is_an_outcome(python, tmp_path):
    (tmp_path / "file").write_text("")
    env = {"PAGE_PRIMER_IMAGE_DIR": str(tmp_path / "file" / "images")}
    with Gunicorn(python, tmp_path, env=env) as server:
        # `auto` goes on to memory without a file.
        ((_, message),) = server.lines("INFO")
        assert "(memfd" in message or "(anonymous" in message
        assert any(
            "its parent is not a directory" in message for _, message in server.lines("DEBUG")
        )


def py_spy(*arguments):
    path = Path(sys.executable).with_name("py-spy")
    done = subprocess.run([str(path), *arguments], capture_output=True, text=True)
    return done.stdout + done.stderr


def can_ptrace():
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return IS_ROOT or not scope.exists() or scope.read_text().strip() == "0"


PROFILED = (
    """
import json, threading
def spin_in_json():
    while True:
        json.loads('[1, 2.5, {"a": [null, true]}]')
threading.Thread(target=spin_in_json, daemon=True).start()
"""
    + APP
)


@pytest.mark.slow
@pytest.mark.skipif(not can_ptrace(), reason="ptrace of other processes is not allowed here")
def test_py_spy_and_gdb_name_the_frames(every_python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(every_python, tmp_path, env=env, app=PROFILED) as server:
        (worker,) = server.workers
        check([worker])
        dump = py_spy("dump", "--pid", str(worker))
        assert "spin_in_json (served.py" in dump, dump
        assert re.search(r"run_for_one|run \(gunicorn/workers/sync.py", dump), dump
        native = py_spy("dump", "--native", "--pid", str(worker))
        assert "spin_in_json (served.py" in native, native
        gdb = subprocess.run(
            ["gdb", "-p", str(worker), "-batch", "-ex", "thread apply all bt"],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        ).stdout  # fmt: skip
        # From 3.14 on the evaluation loop may be compiled to parts that have no names.
        asked = [every_python, "-c", "import sys; print(sys.version_info >= (3, 14))"]
        in_parts = subprocess.check_output(asked, text=True) == "True\n"
        assert "_PyEval_EvalFrameDefault" in gdb or (in_parts and "PyEval_EvalCode" in gdb), gdb
        assert "select" in gdb, gdb
        server.get()


def kernel_faults(name):
    """What the kernel has logged of faults of its own, or of processes of a name; None where its
    log is not readable. Tests that run beside this one have processes that end by a signal."""
    done = subprocess.run(["dmesg"], capture_output=True, text=True)
    if done.returncode:
        return None
    return [
        line
        for line in done.stdout.splitlines()
        if "Bad page" in line or "BUG:" in line or f"{name}[" in line or f"({name})" in line
    ]


def answer(port):
    """The body of a response. By http.client it would take half of the processor's time."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        response = b""
        while data := connection.recv(4096):
            response += data
    head, end, body = response.partition(b"\r\n\r\n")
    assert end and head.startswith(b"HTTP/1.1 200 "), response
    return body


class Load:
    """Threads that send requests until so many have been answered, counting failures."""

    def __init__(self, server, total, threads=4):
        self.server, self.left, self.failed = server, total, 0
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self._run) for _ in range(threads)]
        for thread in self.threads:
            thread.start()

    def _run(self):
        while True:
            with self.lock:
                if self.left <= 0:
                    return
                self.left -= 1
            try:
                assert answer(self.server.port).isdigit()
            except (OSError, AssertionError):
                with self.lock:
                    self.failed += 1

    def running(self):
        return any(thread.is_alive() for thread in self.threads)

    def join(self):
        for thread in self.threads:
            thread.join()
        return self.failed


def churn(server, total):
    """Serve `total` requests while workers are killed, HUPped and re-forked; returns the number
    of failed requests and of kills."""
    load = Load(server, total)
    turn = kills = 0
    while load.running():
        time.sleep(0.1)
        turn += 1
        with contextlib.suppress(OSError, IndexError):
            if turn % 8 == 0:
                os.kill(server.master, signal.SIGHUP)
            elif turn % 2 == 0:
                os.kill(server.workers[turn % 4], signal.SIGTERM)
            elif turn % 5 == 0:
                os.kill(server.workers[turn % 4], signal.SIGKILL)
                kills += 1
    return load.join(), kills


@pytest.mark.slow
def test_twenty_thousand_requests_under_churn(images, tmp_path):
    """No more failed requests than the same churn costs an unprimed server: a request that a
    SIGKILLed worker was serving, and no others."""
    interpreter = Path(python_of(tmp_path, BASE))
    python = interpreter.with_name("python-churned")  # by which the kernel's log tells it
    python.symlink_to(interpreter.name)
    faults = kernel_faults(python.name)
    for primed in ("0", "1"):
        directory = tmp_path / primed
        directory.mkdir()
        (directory / "gunicorn.conf.py").write_text(FROZEN)
        env = {"PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER": primed}
        options = ["--workers", "4", "--max-requests", "300", "--max-requests-jitter", "100"]
        with Gunicorn(str(python), directory, *options, env=env) as server:
            failed, kills = churn(server, 20_000)
            assert kills
            # Each thread has one request under way at most.
            assert failed <= 4 * kills, server.log()[-4000:]
            if primed == "1":
                # Workers may still end, and those in their place be about to lock.
                wait_for(
                    lambda: (
                        len(server.workers) == 4
                        and all(is_primed(pid) for pid in (server.master, *server.workers))
                    ),
                    "four primed workers",
                )
        log = server.log()
        ends = set(re.findall(r"was sent (SIG\w+)", log))
        assert ends <= {"SIGKILL", "SIGTERM", "SIGHUP"}, ends
        assert "Traceback" not in log
    assert kernel_faults(python.name) == faults
