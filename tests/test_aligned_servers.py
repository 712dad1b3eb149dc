"""Processes and servers on an aligned interpreter: its code is on huge pages already, nothing is
copied, and priming adds the locks."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from harness import aligned, outside
from harness.elves import huge_files_here
from harness.gunicorn_server import CONF
from harness.process import Process, interpreter
from harness.servers import NO_CONTROL_SOCKET, Server, check, children, free_port, wait_for

APP = """
def wsgi(environ, start_response):
    start_response("200 OK", [])
    return [b"ok"]

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})
"""

TASKS = """
import os
from celery import Celery
app = Celery("served", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(broker_connection_retry_on_startup=True,
                imports=["page_primer.integrations.celery"])

@app.task
def pid():
    return os.getpid()
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """An aligned copy of the interpreter that runs the tests."""
    directory = tmp_path_factory.mktemp("aligned")
    if reason := huge_files_here(directory):
        pytest.skip(reason)
    return aligned.copy_of(sys.executable, directory)


@pytest.fixture
def env(copy, tmp_path):
    return {**copy.env, "PAGE_PRIMER_IMAGE_DIR": str(tmp_path / "images"), "C_FORCE_ROOT": "1"}


def require_aligned(pids, copy, log, images):
    """Each process has the file's own pages, huge and locked; they are one copy in memory."""
    texts = check(pids)
    for text in texts:
        assert text.path == str(copy.code)
        assert {vma.path for vma in text.span_vmas} == {str(copy.code)}
    assert "huge already" in log
    # Other objects may have been copied.
    assert not list(images.rglob(copy.code.name))
    assert sum(text.pss for text in texts) <= 1.05 * max(text.span for text in texts)


def test_plain_processes(copy):
    """With nothing of ours: as users start them, isolated, and spawned by another."""
    wait = "import sys; print(flush=True); sys.stdin.read()"
    spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {wait!r}], check=True)"
    for options in (["-c", wait], ["-I", "-c", wait], ["-c", spawn]):
        with subprocess.Popen(
            [copy.python, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **copy.env},
        ) as process:  # fmt: skip
            assert process.stdout.readline() == b"\n"
            pids = [process.pid, *children(process.pid)]
            texts = [outside.text_of(pid, str(copy.code)) for pid in pids]
            process.communicate()
        assert len(pids) == (2 if spawn in options else 1)
        for text in texts:
            assert text.huge == text.attainable > 0, (options, text)


@pytest.mark.images
def test_small_pages_become_one_image_and_the_log_names_warm(copy, env, tmp_path):
    """As after drop_caches, where ld.so has read the file first."""
    twin = aligned.rewritten(copy, tmp_path, 32 << 10)
    env = {**env, **twin.env}
    with Process(twin.python, env=env) as one, Process(twin.python, env=env) as other:
        assert outside.text_of(one.pid, str(twin.code)).huge == 0
        found = interpreter(one.prime())
        if found["backing"] == "in_place":
            pytest.skip("this kernel makes the file's own pages huge")
        assert (found["backing"], found["aligned"]) == ("image", True)
        summary = other.run("import page_primer; result = page_primer.prime().summary()")
        assert "aligned but in memory on small pages: `page-primer warm`" in summary
        texts = check([one.pid, other.pid])
        assert len({vma.path for text in texts for vma in text.moved}) == 1
        assert sum(text.pss for text in texts) <= 1.05 * max(text.span for text in texts)


@pytest.mark.slow
def test_gunicorn(copy, env, tmp_path):
    (tmp_path / "served.py").write_text(APP)
    port = free_port()
    command = [copy.python, "-m", "gunicorn", "-c", CONF, "-w", "2", "-b", f"127.0.0.1:{port}",
               *NO_CONTROL_SOCKET, "served:wsgi"]  # fmt: skip
    with Server(tmp_path, port, *command, env=env) as server:
        wait_for(lambda: len(children(server.pid)) == 2, "the workers")
        pids = [server.pid, *children(server.pid)]
        require_aligned(pids, copy, server.log(), tmp_path / "images")


@pytest.mark.slow
def test_uvicorn_with_four_spawned_workers(copy, env, tmp_path):
    (tmp_path / "served.py").write_text(APP)
    port = free_port()
    factory = "page_primer.integrations.uvicorn:create_app"
    command = [copy.python, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port),
               "--workers", "4", "--factory", factory]  # fmt: skip
    env = {**env, "PAGE_PRIMER_APP": "served:app", "PYTHONPATH": "."}
    with Server(tmp_path, port, *command, env=env) as server:
        wait_for(lambda: server.log().count("huge already") == 4, "four reports", 60)
        # Beside them the parent has started the resource tracker of multiprocessing. They say who
        # they are after their reports.
        started = re.compile(r"Started server process \[(\d+)\]")
        wait_for(lambda: len(started.findall(server.log())) == 4, "four workers", 60)
        workers = [int(pid) for pid in started.findall(server.log())]
        assert len(workers) == 4 and set(workers) <= set(children(server.pid))
        require_aligned(workers, copy, server.log(), tmp_path / "images")


@pytest.mark.slow
def test_celery(copy, env, tmp_path, request):
    pytest.importorskip("celery", reason="Celery is not installed")
    broker = request.getfixturevalue("broker")
    (tmp_path / "served.py").write_text(TASKS)
    env = {**os.environ, **env, "BROKER": broker}
    command = [copy.python, "-m", "celery", "-A", "served", "worker", "-l", "INFO", "-c", "2"]
    log = tmp_path / "output"
    with open(log, "wb") as output:
        worker = subprocess.Popen(command, cwd=tmp_path, env=env, stdin=subprocess.DEVNULL,
                                  stdout=output, stderr=output)  # fmt: skip
    try:

        def ready():
            assert worker.poll() is None, log.read_text()
            return " ready." in log.read_text() and len(children(worker.pid)) == 2

        wait_for(ready, "the worker", 90)
        code = "import served; print(*{served.pid.delay().get(timeout=60) for _ in range(9)})"
        done = subprocess.run([copy.python, "-c", code], cwd=tmp_path, env=env, text=True,
                              capture_output=True, timeout=120, check=True)  # fmt: skip
        pool = children(worker.pid)
        assert {int(pid) for pid in done.stdout.split()} <= set(pool)
        require_aligned([worker.pid, *pool], copy, log.read_text(), tmp_path / "images")
    finally:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(60)
        finally:
            if worker.poll() is None:
                for pid in [*children(worker.pid), worker.pid]:
                    os.kill(pid, signal.SIGKILL)
