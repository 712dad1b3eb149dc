"""Other users than the one that runs the tests: a directory that they may enter, an interpreter
that they may run, and the command prefixes that become them."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.interpreters import INTERPRETERS, python_of

__all__ = ["NOBODY", "OTHER", "USER", "become", "capable", "public", "public_python"]

USER, OTHER, NOBODY = 4002, 4003, 65534


def become(user: int, *more: str) -> list[str]:
    """A prefix that runs a command as a user without privileges."""
    return ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *more]


def capable(user: int) -> list[str]:
    """The same with a capability, as systemd's AmbientCapabilities= gives it."""
    return become(user, "--inh-caps=+net_admin", "--ambient-caps=+net_admin")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory on disk that everybody may enter, which pytest's are not."""
    yield (path := _directory())
    shutil.rmtree(path)


def _directory() -> Path:
    path = Path(tempfile.mkdtemp(prefix="page-primer-", dir="/var/tmp"))
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def public_python() -> Iterator[str]:
    """An interpreter that every user may run, with this package."""
    directory = _directory()
    for number, base in enumerate(INTERPRETERS.values()):
        allowed = subprocess.run([*become(USER), base, "-c", ""], stderr=subprocess.DEVNULL)
        if allowed.returncode:
            continue
        home = directory / f"python-{number}"
        home.mkdir()
        python = python_of(home, base)
        command = [*become(USER), python, "-c", "import page_primer._core"]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0:
            yield python
            break
    else:
        pytest.skip("other users may not run any interpreter here, or not see this package")
    shutil.rmtree(directory)
