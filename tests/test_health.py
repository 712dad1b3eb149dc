"""page_primer.status(): from inside, under real servers, and as cheap as it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import outside
from harness.gunicorn_server import Gunicorn
from harness.privileges import has_images
from harness.process import Process, interpreter
from harness.servers import Server, free_port, wait_for

import page_primer
from page_primer import schema

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (the extra `test`)")
SCHEMA = jsonschema.Draft202012Validator(schema.build("health"))

PAGE = Path(__file__).parent.parent / "docs" / "health.md"
WSGI, ASGI = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


def status(process, **arguments):
    found = process.run(f"import page_primer; result = page_primer.status(**{arguments!r})")
    SCHEMA.validate(found)
    return found


def test_before_and_after(python, images):
    with Process(python) as process:
        found = status(process)
        assert (found["primed"], found["reason"], found["pending"]) == (False, None, False)
        assert process.run("import sys; result = 'page_primer._core' in sys.modules") is False
        report = process.prime(image_dir=str(images))
        found = status(process)
        assert (found["pid"], found["primed"], found["pending"]) == (process.pid, True, False)
        assert found["objects"] == len(report["objects"])
        for name in ("code_bytes", "code_huge_bytes", "locked_bytes", "copied_bytes"):
            assert found[name] == report[name], name
        assert found["interpreter"]["path"] == interpreter(report)["path"]
        assert found["vm_locked_bytes"] >= found["locked_bytes"]
        process.run("import ctypes, _decimal, _ctypes, _ssl, sqlite3")
        assert status(process)["pending"], "libraries came"
        process.prime(image_dir=str(images))
        assert not status(process)["pending"]
        process.restore()
        assert not status(process)["primed"]


def test_measured_anew(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        before = status(process)
        process.run("import ctypes; result = ctypes.CDLL(None).munlockall()")
        stale, fresh = status(process), status(process, measure=True)
        assert stale["locked_bytes"] == before["locked_bytes"] > 0
        assert stale["vm_locked_bytes"] == fresh["locked_bytes"] == 0
        assert (stale["measured"], fresh["measured"]) == (False, True)
        assert fresh["code_huge_bytes"] == before["code_huge_bytes"]
        assert fresh["added_bytes"] == before["added_bytes"], "not what the host has grown by"


def test_a_fork_has_no_locks_but_those_that_it_makes(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        plain, locked = (
            process.run(
                "import json, os, page_primer\nr, w = os.pipe()\nchild = os.fork()\n"
                f"if child == 0: {first}; os.write(w, json.dumps(page_primer.status()).encode()); "
                "os._exit(0)\n"
                "os.waitpid(child, 0)\nresult = json.loads(os.read(r, 1 << 16))"
            )
            # The second as the launcher does it in each child.
            for first in ("pass", "page_primer.on_process(lambda p: p.lock_in_child())")
        )
        for found in (plain, locked):
            SCHEMA.validate(found)
            assert found["pending"]
        assert (plain["locked_bytes"], plain["vm_locked_bytes"]) == (0, 0)
        assert locked["locked_bytes"] > 0
        assert locked["vm_locked_bytes"] > 0


@pytest.mark.parametrize(
    ("environ", "before", "reason"),
    [
        ({"PAGE_PRIMER": "0"}, "", "switched off"),
        ({}, "sys.platform = 'darwin'", "not supported here"),
        ({}, "sys.modules['page_primer._core'] = None", "not available here"),
    ],
)
def test_what_does_nothing_says_why(environ, before, reason):
    program = (
        f"import json, sys; {before}\nimport page_primer\npage_primer.prime()\n"
        "print(json.dumps([page_primer.status(), page_primer.status(measure=True)]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    for found in json.loads(done.stdout):
        SCHEMA.validate(found)
        assert (found["primed"], found["reason"]) == (False, reason)


def test_wsgi_example_under_gunicorn(python, images, tmp_path):
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    with Gunicorn(python, tmp_path, "--workers", "2", env=env, app=WSGI) as server:
        server.wait_for_workers(2)
        assert server.get() == b"the application\n"
        seen = {}

        def ask():
            found = json.loads(server.get("/health"))
            SCHEMA.validate(found)
            seen[found["pid"]] = found
            return seen.keys() >= set(server.workers)

        wait_for(ask, "an answer of each worker")
        for pid in server.workers:
            found, text = seen[pid], outside.text_of(pid)
            assert found["primed"], found
            assert found["locked_bytes"], found
            code = found["interpreter"]["code_huge_bytes"]
            text.require_huge()
            assert text.huge <= code <= text.huge + 0x10000, (text, found)


def test_asgi_example_under_uvicorn(python, images, tmp_path):
    (tmp_path / "served.py").write_text(ASGI)
    port = free_port()
    env = {"PAGE_PRIMER_APP": "served:app", "PAGE_PRIMER_IMAGE_DIR": str(images)}
    create = "page_primer.integrations.uvicorn:create_app"
    command = [python, "-m", "uvicorn", "--factory", create, "--port", str(port)]
    with Server(tmp_path, port, *command, env=env) as server:
        assert server.get() == b"the application\n", server.log()
        found = json.loads(server.get("/health"))
        SCHEMA.validate(found)
        assert (found["pid"], found["primed"], found["reason"]) == (server.pid, True, None)
        core = found["interpreter"]
        assert core["attainable_bytes"] >= core["code_huge_bytes"] > 0
        assert core["code_huge_bytes"] == core["attainable_bytes"] or not has_images()


def test_a_package_that_is_gone_under_a_running_server(python, images, tmp_path):
    """As while it is upgraded: what is asked first then has to be read first."""
    copy = tmp_path / "page_primer"
    shutil.copytree(os.path.dirname(page_primer.__file__), copy)
    with Process(python) as process:
        process.run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
        process.prime(image_dir=str(images))
        pid, place = process.run("import os; result = os.getpid(), page_primer.__file__")
        assert place.startswith(str(copy))
        shutil.rmtree(copy)
        found = process.run("result = page_primer.status()")
        assert found.keys() == {"pid", "primed", "reason", "detail"}
        assert (found["pid"], found["primed"]) == (pid, True)
        assert (found["reason"], "health" in found["detail"]) == ("not available here", True)
        process.run("page_primer.restore()")
        assert not process.run("result = page_primer.status()")["primed"]
