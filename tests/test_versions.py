"""Versions: the package's own, and the frameworks' oldest, which are written in several places."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from harness.servers import free_port

import page_primer
from page_primer.integrations import versions

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()

# Real servers that think they are older.
OLD = {
    "gunicorn": "import gunicorn; gunicorn.__version__ = '20.1.0'\n"
    "from gunicorn.app.wsgiapp import run\n"
    "sys.argv[1:] = ['-c', 'python:page_primer.integrations.gunicorn_conf', '-b', address, 'app']\n"
    "run()",
    "gunicorn's hooks": "import gunicorn; gunicorn.__version__ = '20.1.0'\n"
    "from gunicorn.app.wsgiapp import run\n"
    "sys.argv[1:] = ['-c', 'hooks.py', '-b', address, 'app']\n"
    "run()",
    "uvicorn": "import uvicorn; uvicorn.__version__ = '0.29.0'\n"
    "sys.argv[1:] = ['--factory', 'page_primer.integrations.uvicorn:create_app']\n"
    "uvicorn.main()",
    "celery": "import celery; celery.__version__ = '5.3.6'\n"
    "from celery.bin.celery import main\n"
    "sys.argv[1:] = ['-A', 'tasks', 'worker', '--pool', 'solo']\n"
    "main()",
}
FILES = {
    "app.py": "async def asgi(scope, receive, send): ...",
    "hooks.py": "on_starting = 'page_primer.integrations.gunicorn.on_starting'",
    "tasks.py": "from celery import Celery\napp = Celery('tasks', broker='memory://')\n"
    "app.conf.imports = ['page_primer.integrations.celery']",
}


def test_the_packages_own():
    (version,) = re.findall(r'^version = "(.*)"$', PROJECT, re.MULTILINE)
    heading = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(heading[1])}(\.dev\d+|rc\d+)?", version)
    assert page_primer.__version__ == metadata.version("page-primer")


@pytest.mark.parametrize("framework", versions.TESTED)
def test_one_table(framework):
    """pyproject.toml and README say what the table says; noxfile.py reads it."""
    oldest, newest = versions.TESTED[framework]
    short = oldest.removesuffix(".0")
    assert f'{framework} = ["{framework}>={short}"]' in PROJECT
    readme = " ".join((ROOT / "README.md").read_text().split())
    name = framework.capitalize() if framework == "celery" else framework
    assert f"{name} {short} and {newest}" in readme


@pytest.mark.parametrize("version", ["21.2.0", "21.2", "27.0.1", "100.0", "", "unknown", "1", "v9"])
def test_new_enough_or_says_nothing(version):
    versions.require("gunicorn", version)


@pytest.mark.parametrize("version", ["21.1.9", "20.0.4", "0.1"])
def test_too_old(version):
    with pytest.raises(
        ValueError, match=f"^gunicorn {re.escape(version)} is too old: .* 21.2.0 or"
    ):
        versions.require("gunicorn", version)


@pytest.mark.parametrize("framework", OLD)
def test_an_old_framework_stops_with_one_line(tmp_path, framework):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text + "\n")
    program = f"import sys; address = '127.0.0.1:{free_port()}'\n{OLD[framework]}"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PAGE_PRIMER_APP": "app:asgi", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    said = [line for line in (done.stdout + done.stderr).splitlines() if "too old" in line]
    assert done.returncode != 0
    assert len(said) == 1, done.stderr
    oldest = versions.TESTED[framework.partition("'")[0]][0]
    assert said[0].endswith(f"is too old: page-primer requires {oldest} or newer")
    assert "Traceback" not in done.stderr
