"""gunicorn's other processes: the dirty arbiter and its workers (gunicorn 25), and what the `asgi`
worker (gunicorn 24) imports in its lifespan. A real gunicorn; checked from outside in smaps."""

import contextlib
import importlib.util
import os
import re
import signal
import textwrap
import time

import gunicorn
import pytest
from harness import outside
from harness.gunicorn_server import Gunicorn, require_no_failure
from harness.privileges import locks_fit
from harness.servers import check, children, wait_for

VERSION = tuple(int(part) for part in gunicorn.__version__.split(".")[:2])
needs_dirty = pytest.mark.skipif(
    VERSION < (25, 0), reason=f"gunicorn {gunicorn.__version__} has no dirty workers (25.0 has)"
)
needs_asgi = pytest.mark.skipif(
    VERSION < (24, 0), reason=f"gunicorn {gunicorn.__version__} has no asgi worker (24.0 has)"
)
needs_numpy = pytest.mark.skipif(
    importlib.util.find_spec("numpy") is None, reason="numpy, a library to move, is not installed"
)

DIRTY_APP = """
import os
from gunicorn.dirty.app import DirtyApp
from gunicorn.dirty.client import get_dirty_client
class Heavy(DirtyApp):
    def init(self):
        import numpy
    def __call__(self, action, *args, **kwargs):
        return os.getpid()
def app(environ, start_response):
    pid = os.getpid()
    if environ["PATH_INFO"] == "/dirty":
        pid = get_dirty_client().execute("served:Heavy", "pid")
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(pid).encode()]
"""

ASGI_APP = """
import os, sys
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                import numpy
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await receive()
    body = f"{os.getpid()} {sys._getframe(1).f_code.co_filename}"
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
"""


def environment(images):
    return {"PAGE_PRIMER_IMAGE_DIR": str(images), "PAGE_PRIMER_LIMIT": "256M"}


def dirty_options(tmp_path, workers):
    # gunicorn ends the dirty arbiter of a dead master of the same name, or of another test.
    name = f"{tmp_path.name}-{os.getpid()}"
    return ["--name", name, "--dirty-app", "served:Heavy", "--dirty-workers", str(workers)]


def dirty_arbiter(server):
    """The arbiter's process: the last one that the log names."""
    return int(re.findall(r"Dirty arbiter starting \(pid: (\d+)\)", server.log())[-1])


def dirty_workers(server, count, but_not=()):
    """Wait until so many dirty workers have loaded their application; their processes."""

    def started():
        pids = children(dirty_arbiter(server))
        log = server.log()
        loaded = all(f"Dirty worker {pid} listening" in log for pid in pids)
        return len(pids) == count and loaded and not set(pids) & set(but_not)

    wait_for(started, f"{count} dirty workers")
    return children(dirty_arbiter(server))


def settled_dirty_workers(server, count):
    """Likewise, with none of them about to end: the arbiter looks after them once a second."""
    found = []

    def is_settled():
        nonlocal found
        before, found = found, dirty_workers(server, count)
        time.sleep(1.5)
        return found == before

    wait_for(is_settled, f"the same {count} dirty workers for longer than a second", 60)
    return found


def check_numpy(pids):
    """Hot chunks of numpy's largest extension module are moved, and it is locked."""
    for pid in pids:
        (path,) = {
            v.path for v in outside.smaps(pid)
            if "/_multiarray_umath" in v.path and "w" in v.perms
        }  # fmt: skip
        text = outside.text_of(pid, path)
        assert text.huge > 0, text
        text.require_hot_chunks_huge()


@pytest.mark.slow
@needs_dirty
@needs_numpy
def test_dirty_processes_are_huge_and_locked(kind, images, tmp_path):
    options = dirty_options(tmp_path, 2)
    with Gunicorn(kind, tmp_path, *options, env=environment(images), app=DIRTY_APP) as server:
        workers = dirty_workers(server, 2)
        arbiter = dirty_arbiter(server)
        check([arbiter, *workers, *server.workers, server.master])
        check_numpy(workers)
        answered = int(server.get("/dirty"))
        assert answered in workers

        # What they say is what differs, as with other workers; where locks are limited, all do.
        if locks_fit():
            assert {pid for pid, _ in server.lines("DEBUG")} >= {arbiter, *workers}
            assert {pid for pid, _ in server.lines("INFO")} <= {server.master, *workers}
            assert server.lines("WARNING") == []

        # One that dies is replaced. The arbiter is connected to this one: on Python 3.12 or newer
        # SIGTERM would not end it before its connection ends, and HUP would not come to an end
        # (gunicorn 27.0; asyncio.Server.wait_closed()).
        os.kill(answered, signal.SIGKILL)
        again = dirty_workers(server, 2, but_not=[answered])
        check(again)
        check_numpy(again)

        # HUP: the master tells the arbiter, which starts as many new ones and ends as many. Which
        # ones depends on chance: gunicorn 27.0's reload() ends the last of its list, which are new,
        # unless its monitor comes first.
        os.kill(server.master, signal.SIGHUP)
        wait_for(lambda: server.log().count("Spawned dirty worker") >= 5, "two more dirty workers")
        workers = settled_dirty_workers(server, 2)
        assert dirty_arbiter(server) == arbiter
        check([arbiter, *workers])
        check_numpy(workers)

        # An arbiter that ends is replaced, too.
        os.kill(arbiter, signal.SIGTERM)
        wait_for(lambda: dirty_arbiter(server) != arbiter, "another arbiter")
        workers = dirty_workers(server, 2)
        check([dirty_arbiter(server), *workers])
        check_numpy(workers)
        require_no_failure(server)


@pytest.mark.slow
@needs_dirty
@needs_numpy
def test_the_users_own_dirty_hooks_are_called(python, images, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text(
        textwrap.dedent("""
        def on_dirty_starting(arbiter): arbiter.log.info("their on_dirty_starting")
        def dirty_post_fork(arbiter, worker): arbiter.log.info("their dirty_post_fork")
        def dirty_worker_init(worker): worker.log.info("their dirty_worker_init")
        def dirty_worker_exit(arbiter, worker): arbiter.log.info("their dirty_worker_exit")
        """)
    )
    options = dirty_options(tmp_path, 1)
    with Gunicorn(python, tmp_path, *options, env=environment(images), app=DIRTY_APP) as server:
        workers = dirty_workers(server, 1)
        check([dirty_arbiter(server), *workers])
        check_numpy(workers)
        os.kill(workers[0], signal.SIGKILL)
        dirty_workers(server, 1, but_not=workers)
        log = server.log()
        assert log.count("their on_dirty_starting") == 1
        assert log.count("their dirty_post_fork") == 2
        assert log.count("their dirty_worker_init") == 2
        assert log.count("their dirty_worker_exit") == 1
        assert re.search(rf"\[{workers[0]}\] .*their dirty_worker_init", log)


def asgi_caller(server):
    """The process that answers, and the file of the function that called the application."""
    pid, caller = server.get().decode().split()
    return int(pid), caller


@pytest.mark.slow
@needs_asgi
@needs_numpy
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_asgi_worker_is_primed_after_its_lifespan(kind, images, tmp_path, preload):
    options = ["--worker-class", "asgi", "--workers", "2", *preload]
    env = environment(images)
    with Gunicorn(kind, tmp_path, *options, env=env, app=ASGI_APP) as server:
        server.wait_for_workers(2)
        old = server.workers
        # A worker listens only after its lifespan.
        wait_for(lambda: server.log().count("ASGI server listening") == 2, "both workers")
        check([server.master, *old])
        check_numpy(old)
        # gunicorn itself calls the application: nothing of ours is on a request's way.
        pid, caller = asgi_caller(server)
        assert pid in old
        assert caller.endswith("gunicorn/asgi/protocol.py")

        os.kill(server.master, signal.SIGHUP)
        server.wait_for_workers(2, but_not=old)
        wait_for(lambda: server.log().count("ASGI server listening") == 4, "both new workers")
        check([server.master, *server.workers])
        check_numpy(server.workers)
        # The application has heard of its end.
        assert "lifespan shutdown error" not in server.log().lower()
        require_no_failure(server)


@pytest.mark.slow
@needs_asgi
@pytest.mark.parametrize(
    ("mode", "first_line"),
    [
        ("off", "assert scope['type'] != 'lifespan'"),
        ("auto", "if scope['type'] == 'lifespan': raise ValueError('none here')"),
    ],
)
def test_asgi_worker_without_a_lifespan(python, images, tmp_path, mode, first_line):
    app = ASGI_APP.replace("send):\n", f"send):\n    {first_line}\n", 1)
    options = ["--worker-class", "asgi", "--asgi-lifespan", mode]
    with Gunicorn(python, tmp_path, *options, env=environment(images), app=app) as server:
        for _ in range(2):
            pid, caller = asgi_caller(server)
            assert caller.endswith("gunicorn/asgi/protocol.py")
        check([server.master, pid])
        require_no_failure(server)


@needs_asgi
def test_asgi_lifespan_that_fails_stops_the_start(python, images, tmp_path):
    """As without page-primer: with gunicorn's own message and exit status."""
    app = """
async def app(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed", "message": "no database"})
"""
    outcomes = []
    for name in ("without", "primed"):
        (tmp_path / name).mkdir()
        options = ["--worker-class", "asgi"]
        conf = {} if name == "primed" else {"conf": None}
        server = Gunicorn(
            python, tmp_path / name, *options, env=environment(images), app=app, **conf
        )
        with contextlib.closing(server.output):
            status = server.process.wait(60)
        said = re.findall(r"\[ERROR\] (ASGI lifespan .*)", server.log())
        outcomes.append((status, said))
        require_no_failure(server)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == ["ASGI lifespan startup failed: Lifespan startup failed: no database"]
