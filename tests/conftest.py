"""Fixtures: interpreters to test under, and directories for images that the tests clean up."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("harness")  # which is imported below

# ruff: noqa: E402
from harness.debian_python import DEBIAN, LIBRARY, PACKAGE, build_shared
from harness.interpreters import INTERPRETERS, KINDS, python_of
from harness.kernel import release
from harness.kernel_log import KernelLog, faults
from harness.placement import require_images
from harness.scopes import LONG, scope_of
from harness.servers import free_port, wait_for

# Set by the package's own options; a person's environment must not decide what a test sees.
for _name in [name for name in os.environ if name.startswith("PAGE_PRIMER")]:
    del os.environ[_name]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Two thousand tests, in each process, stay: nothing that the garbage collector could free now
    or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # not where pytest-xdist is not installed

    class LongFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

    config.option.loadscopereorder = False  # by numbers of tests
    return LongFirst(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {scope: number for number, scope in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(scope_of(item.nodeid), len(rank)))
    for item in items:
        if "broker" in getattr(item, "fixturenames", ()):
            item.add_marker("broker")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the markers `root`, `images` and `kernel` say cannot be done here."""
    for marker in item.iter_markers("root"):
        if os.geteuid() != 0:
            pytest.skip(f"only root can {marker.args[0]}")
    if item.get_closest_marker("images"):
        require_images()
    for marker in item.iter_markers("kernel"):
        *since, what = marker.args
        if release() < tuple(since):
            pytest.skip(f"{what} is there from Linux {'.'.join(map(str, since))} on")


@pytest.fixture(scope="session")
def kernel_log() -> KernelLog | None:
    """The kernel's log, where it can be read."""
    try:
        return KernelLog()
    except OSError:
        return None


@pytest.fixture(autouse=True)
def _no_kernel_faults(kernel_log: KernelLog | None) -> Iterator[None]:
    """The kernel logs no fault during a test: its own, or of a process that was looked at."""
    yield
    if kernel_log is not None:
        assert faults(kernel_log.new()) == [], "in the kernel's log, during this test"


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
