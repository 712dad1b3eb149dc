"""uvicorn, other ASGI servers and WSGI servers: real ones, asked over HTTP, looked at in smaps."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from harness import outside
from harness.servers import (
    NO_CONTROL_SOCKET,
    Server,
    check,
    children,
    free_port,
    patient_uvicorn,
    wait_for,
)

BIN = Path(sys.executable).parent

# Answers with the id of its process; tells of its lifespan.
APP = """
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                import ssl  # a library that start-up brings in
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await receive()
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
def create():
    return app
"""

WSGI = """
import os
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
from page_primer.integrations.wsgi import primed
app = primed(app)
"""

CREATE_APP = "page_primer.integrations.uvicorn:create_app"


def environment(images, **more):
    return {"PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONPATH": ".", **more}


def uvicorn(port, *options):
    return [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(port), *options]


def serving(server, count=1, seconds=30):
    """The processes that answer requests."""
    found = set()
    end = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < end:
        found.add(int(server.get()))
    assert len(found) >= count
    return sorted(found)


def check_late_library(pids):
    """The library that start-up brought in is locked as well, and huge where it is hot."""
    for pid in pids:
        for path in {v.path for v in outside.smaps(pid) if "libcrypto" in v.path}:
            if any(v.path == path and "w" in v.perms for v in outside.smaps(pid)):
                outside.text_of(pid, path).require_hot_chunks_huge()


def primer_lines(server):
    return [line for line in server.log().splitlines() if "of code on huge pages" in line]


@pytest.fixture
def application(tmp_path):
    (tmp_path / "served.py").write_text(APP)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("target", ["served:app", "served:create"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_uvicorn_by_name(application, images, target, loop):
    env = environment(images, PAGE_PRIMER_APP=target)
    port = free_port()
    command = uvicorn(port, "--loop", loop, "--factory", CREATE_APP)
    with Server(application, port, *command, env=env) as server:
        check(serving(server))
        check_late_library(serving(server))
        lines = primer_lines(server)
        # The interpreter once; the late library may make a second line, of its own.
        assert 1 <= len(lines) <= 2
        assert all(line.startswith("INFO:     page-primer: ") for line in lines)


@pytest.mark.slow
def test_uvicorn_workers_share_one_copy(application, images):
    env = environment(images, PAGE_PRIMER_APP="served:app")
    port = free_port()
    command = uvicorn(port, "--workers", "4", *patient_uvicorn(), "--factory", CREATE_APP)
    with Server(application, port, *command, env=env) as server:
        wait_for(lambda: len(children(server.pid)) >= 4, "four workers")
        workers = serving(server, 4)
        texts = check(workers)
        outside.require_one_copy(texts)
        check_late_library(workers)


@pytest.mark.slow
def test_uvicorn_reload(application, images):
    env = environment(images, PAGE_PRIMER_APP="served:app")
    port = free_port()
    command = uvicorn(port, "--reload", "--factory", CREATE_APP)
    with Server(application, port, *command, env=env) as server:
        (first,) = serving(server)
        check([first])

        def reloaded():
            # The reloader knows of a change by the second time it looks at the files, and may not
            # have looked yet.
            os.utime(application / "served.py")
            return int(server.get()) != first

        wait_for(reloaded, "the reload")
        check(serving(server))


@pytest.mark.parametrize(
    "ending",
    ["app = primed(app)", "create = primed(create)"],
    ids=["application", "factory"],
)
def test_uvicorn_in_code(application, images, ending):
    (application / "served.py").write_text(
        APP + f"from page_primer.integrations.uvicorn import primed\n{ending}\n"
    )
    port = free_port()
    target = ["served:app"] if ending.startswith("app") else ["--factory", "served:create"]
    with Server(application, port, *uvicorn(port, *target), env=environment(images)) as server:
        check(serving(server))
        check_late_library(serving(server))


@pytest.mark.slow
@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["", "preload"])
def test_uvicorn_worker_under_gunicorn(application, images, preload):
    (application / "served.py").write_text(
        APP + "from page_primer.integrations.uvicorn import primed\napp = primed(app)\n"
    )
    port = free_port()
    command = [
        sys.executable, "-m", "gunicorn", "-b", f"127.0.0.1:{port}", "-w", "2", *preload,
        *NO_CONTROL_SOCKET, "-k", "uvicorn_worker.UvicornWorker", "served:app",
    ]  # fmt: skip
    with Server(application, port, *command, env=environment(images)) as server:
        wait_for(lambda: len(children(server.pid)) == 2, "two workers")
        check(serving(server, 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (None, "nowhere:app"),
        (APP, "served:nothing"),
        (APP, "served"),
        ("import not_there\n" + APP, "served:app"),
        ("1 / 0\n" + APP, "served:app"),
        ("def create():\n    raise TypeError('their own mistake')\n", "served:create"),
        ("def create():\n    return len(5)\n", "served:create"),
        ("def create():\n    raise RuntimeError('no database')\n", "served:create"),
    ],
    ids=["module", "attribute", "form", "import", "body", "typeerror", "typeerror2", "runtime"],
)
def test_errors_of_the_target_look_as_without_us(tmp_path, images, source, target):
    if source:
        (tmp_path / "served.py").write_text(source)
    factory = ["--factory"] if target.endswith("create") else []

    def outcome(*options, **env):
        done = subprocess.run(
            uvicorn(free_port(), *options), cwd=tmp_path, capture_output=True, text=True,
            env={**os.environ, **environment(images, **env)}, timeout=60,
        )  # fmt: skip
        # The frames of a traceback differ; what is said of it does not.
        said = [line for line in done.stderr.splitlines() if not line.startswith((" ", "INFO"))]
        return done.returncode, said

    plain = outcome(*factory, target)
    assert outcome("--factory", CREATE_APP, PAGE_PRIMER_APP=target) == plain
    assert plain[0] != 0


def test_missing_and_bad_variables_are_one_line(application, images):
    def error(**env):
        done = subprocess.run(
            uvicorn(free_port(), "--factory", CREATE_APP), cwd=application, capture_output=True,
            text=True, env={**os.environ, **environment(images, **env)}, timeout=60,
        )  # fmt: skip
        assert done.returncode in (1, 3)
        assert "Traceback" not in done.stderr
        return done.stderr

    assert "ERROR:    page-primer: PAGE_PRIMER_APP must name the application" in error()
    assert "ERROR:    page-primer: PAGE_PRIMER_LIMIT must be" in error(
        PAGE_PRIMER_APP="served:app", PAGE_PRIMER_LIMIT="lots"
    )


ASGI_SERVERS = {
    "hypercorn": lambda port: [
        sys.executable, "-m", "hypercorn", "-w", "2", "-b", f"127.0.0.1:{port}", "served:app",
    ],
    "granian": lambda port: [
        sys.executable, "-m", "granian", "--interface", "asgi", "--workers", "2",
        "--port", str(port),
        "served:app",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ASGI_SERVERS)
def test_other_asgi_servers(application, images, name):
    (application / "served.py").write_text(
        APP + "from page_primer.integrations.asgi import primed\napp = primed(app)\n"
    )
    port = free_port()
    with Server(application, port, *ASGI_SERVERS[name](port), env=environment(images)) as server:
        workers = serving(server)
        check(workers)
        check_late_library(workers)
        assert "[INFO] page-primer: " in server.log(), "by the server's own logger"


def test_a_server_without_lifespan_primes_at_the_first_request(application, images):
    (application / "served.py").write_text(
        APP + "from page_primer.integrations.asgi import primed\napp = primed(app)\n"
    )
    port = free_port()
    command = uvicorn(port, "--lifespan", "off", "served:app")
    with Server(application, port, *command, env=environment(images)) as server:
        check(serving(server))


def uwsgi():
    path = BIN / "uwsgi"
    if not path.exists():
        pytest.skip("uWSGI is not installed")
    return str(path)


WSGI_SERVERS = {
    "waitress": lambda port: [
        sys.executable, "-m", "waitress", "--listen", f"127.0.0.1:{port}", "served:app",
    ],
    "gunicorn": lambda port: [
        sys.executable, "-m", "gunicorn", "-w", "2", "--preload", *NO_CONTROL_SOCKET,
        "-b", f"127.0.0.1:{port}", "served:app",
    ],
    "uwsgi": lambda port: [
        uwsgi(), "--master", "--processes", "2", "--http-socket", f"127.0.0.1:{port}",
        "--wsgi", "served:app", "--die-on-term", "--home", sys.prefix,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", WSGI_SERVERS)
def test_wsgi_servers(tmp_path, images, name):
    (tmp_path / "served.py").write_text(WSGI)
    port = free_port()
    with Server(tmp_path, port, *WSGI_SERVERS[name](port), env=environment(images)) as server:
        # In a process that was forked after the application was wrapped, the locks are lost until
        # its first request.
        check(serving(server))
        said = {"waitress": "INFO:waitress:page-primer: ", "gunicorn": "[INFO] page-primer: "}
        assert said.get(name, "") in server.log()  # uWSGI has no logger


def test_attributes_are_the_applications():
    source = textwrap.dedent("""
        from page_primer.integrations import asgi, wsgi
        class App:
            state = "theirs"
            async def __call__(self, scope, receive, send): ...
        assert asgi.primed(App()).state == "theirs"
        try:
            asgi.primed(App()).nothing
        except AttributeError as error:
            assert "'App' object has no attribute 'nothing'" in str(error)
    """)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_older_applications_pass_through(images):
    """ASGI 2 and WSGI applications under uvicorn: primed at once, and returned as they are."""
    source = textwrap.dedent("""
        from page_primer.integrations.uvicorn import primed
        class Two:
            def __init__(self, scope): ...
            async def __call__(self, receive, send): ...
        def wsgi(environ, start_response): ...
        assert primed(Two) is Two and primed(wsgi) is wsgi
        async def three(scope, receive, send): ...
        assert primed(three) is not three
    """)
    env = {**os.environ, **environment(images)}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
