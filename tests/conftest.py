"""Interpreters to test under, and directories for images that the tests clean up."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from debian_python import DEBIAN, LIBRARY, PACKAGE, build_shared
from elftools.elf.elffile import ELFFile

import page_primer

ROOT = Path(__file__).parents[1]

# Set by the package's own options; a person's environment must not decide what a test sees.
for _name in [name for name in os.environ if name.startswith("PAGE_PRIMER")]:
    del os.environ[_name]


def _interpreters() -> dict[str, str]:
    """Every CPython since 3.10 on this machine: version and a number -> path."""
    places = [
        "/usr/bin/python3.[0-9]*",
        "/usr/local/bin/python3.[0-9]*",
        os.path.expanduser("~/.pyenv/versions/*/bin/python3.[0-9]*"),
        sys._base_executable,
    ]
    found: dict[str, str] = {}
    seen = set()
    for path in [path for place in places for path in sorted(glob.glob(place))]:
        real = os.path.realpath(path)
        named = re.fullmatch(r"python(3(\.\d+)?)?", os.path.basename(path))
        if real in seen or not named or not os.access(path, os.X_OK):
            continue
        seen.add(real)
        question = (
            "import sys, sysconfig, json; print(json.dumps([sys.version_info[:3], "
            "sys.implementation.name, bool(sysconfig.get_config_var('Py_GIL_DISABLED'))]))"
        )
        answer = subprocess.run(
            [path, "-I", "-S", "-c", question], capture_output=True, text=True, check=False
        )
        if answer.returncode:
            continue
        version, implementation, free_threaded = json.loads(answer.stdout)
        # The stable ABI that the tests' own build has does not cover free-threaded builds.
        if implementation == "cpython" and tuple(version) >= (3, 10) and not free_threaded:
            number = ".".join(map(str, version))
            found.setdefault(f"{number}-{len(found)}", path)
    return found


INTERPRETERS = _interpreters()


def is_shared(python: str) -> bool:
    """Whether an interpreter's code is in a libpython."""
    with open(os.path.realpath(python), "rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")] if dynamic else []
    return any(name.startswith("libpython") for name in needed)


# One interpreter of each kind; of the version that the tests' packages are installed for, if there
# is one.
KINDS = {
    "shared" if is_shared(path) else "static": path
    for path in sorted(
        INTERPRETERS.values(),
        key=lambda path: f"python{sys.version_info[0]}.{sys.version_info[1]}" in path,
    )
}


def python_of(tmp: Path, base: str) -> str:
    """A virtual environment of an interpreter that sees what this test run has installed: all of it
    is pure Python, or built for the stable ABI."""
    home = tmp / "venv"
    if not home.exists():
        subprocess.run([base, "-m", "venv", "--without-pip", str(home)], check=True)
        packages = next(home.glob("lib/python3.*/site-packages"))
        paths = [str(Path(page_primer.__file__).parents[1]), sysconfig.get_path("purelib")]
        (packages / "tests.pth").write_text("\n".join(paths) + "\n")
    return str(home / "bin" / "python")


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(name, marks=() if path in KINDS.values() else pytest.mark.slow)
        for name, path in INTERPRETERS.items()
    ],
)
def every_python(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each interpreter in turn, where other users may run it too, which is not so in pytest's own
    directories."""
    home = Path(tempfile.mkdtemp(prefix="page-primer-"))
    home.chmod(0o755)
    yield python_of(home, INTERPRETERS[request.param])
    shutil.rmtree(home)


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that runs the tests."""
    return sys.executable


@pytest.fixture(scope="session")
def debian_shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with a shared libpython, where no other has one."""
    if not LIBRARY.exists() or shutil.which("gcc") is None:
        pytest.skip(f"no shared interpreter here, nor {PACKAGE} to build one with")
    build_shared(path := tmp_path_factory.mktemp("shared") / os.path.basename(DEBIAN))
    return str(path)


@pytest.fixture(params=["static", "shared"])
def base(request: pytest.FixtureRequest) -> str:
    """An interpreter of each kind, outside a virtual environment."""
    if request.param in KINDS:
        return KINDS[request.param]
    if request.param == "shared":
        return str(request.getfixturevalue("debian_shared"))
    pytest.skip(f"no {request.param} interpreter here")


@pytest.fixture
def kind(base: str, tmp_path: Path) -> str:
    """Its virtual environment."""
    return python_of(tmp_path, base)


@pytest.fixture
def images(tmp_path: Path) -> Iterator[Path]:
    """A directory for images, on the temporary directory's file system."""
    yield tmp_path / "images"
    shutil.rmtree(tmp_path / "images", ignore_errors=True)


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis server of our own; its URL."""
    from servers import free_port, wait_for

    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server (Debian's package of that name)")
    port = free_port()
    directory = tmp_path_factory.mktemp("redis")
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "",
         "--dir", str(directory)], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    ping = ["redis-cli", "-p", str(port), "ping"]
    wait_for(
        lambda: subprocess.run(ping, capture_output=True, text=True).stdout == "PONG\n", "Redis"
    )
    yield f"redis://127.0.0.1:{port}"
    server.terminate()
    server.wait(20)
