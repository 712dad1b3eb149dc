"""The recipes of docs/deploy/, taken from the pages and run, as far as that is possible here."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import outside
from harness.cgroup import Cgroup
from harness.container import OVERLAID, container
from harness.kernel import require_huge_files
from harness.marks import needs_root
from harness.recipes import block
from harness.servers import free_port, get, wait_for
from harness.service import public, public_python
from harness.systemd import Systemd

import page_primer

__all__ = ["public", "public_python"]

WARM = str(Path(sys.executable).with_name("page-primer-warm"))

# Loads OpenSSL, a library with hot chunks, and locks half a megabyte of its own when asked to.
APP = """
import hashlib, mmap, os, ssl
from page_primer import _core
for name in hashlib.algorithms_available - {"shake_128", "shake_256"}:
    hashlib.new(name, b"x", usedforsecurity=False).digest()
ssl.create_default_context()
def app(environ, start_response):
    body = str(os.getpid()).encode()
    if environ["PATH_INFO"] == "/lock":
        size = 512 << 10
        address = _core.reserve(size, mmap.PAGESIZE, 0)
        try:
            _core.protect(address, size, _core.PROT_READ)
            _core.lock(address, size, 0)
        except OSError as error:
            body += f" {error}".encode()
        _core.unmap(address, size)
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


# ---------------------------------------------------------------------------------- containers


class Settings(NamedTuple):
    """What a recipe sets for a container."""

    user: int
    memory: int  # bytes
    memlock: int | None  # bytes; None: the runtime's default


def numbers(text: str, *patterns: str) -> list[int]:
    found = [re.search(pattern, text) for pattern in patterns]
    return [int(one[1]) for one in found if one]


def docker_run() -> Settings:
    text = block("containers.md", "docker run")
    assert "--read-only" in text
    (user,) = numbers(block("containers.md", "FROM debian"), r"\nUSER (\d+)\n")
    memlock, memory = numbers(text, r"--ulimit memlock=(\d+)", r"--memory=(\d+)m")
    return Settings(user, memory << 20, memlock)


def compose() -> Settings:
    text = block("containers.md", "services:")
    assert "read_only: true" in text
    memlock, memory = numbers(text, r"memlock: (\d+)", r"mem_limit: (\d+)m")
    return Settings(docker_run().user, memory << 20, memlock)


def kubernetes() -> Settings:
    text = block("kubernetes.md", "apiVersion")
    assert "readOnlyRootFilesystem: true" in text
    assert numbers(text, r"medium: Memory, sizeLimit: (\d+)Mi") == [64]  # as container() has it
    user, memory = numbers(text, r"runAsUser: (\d+)", r"limits: \{memory: (\d+)Mi\}")
    return Settings(user, memory << 20, None)


def steps(dockerfile: str) -> dict[str, str]:
    """The last of each instruction."""
    return dict(line.split(maxsplit=1) for line in dockerfile.splitlines())


@pytest.fixture(scope="module")
def built(public_python: str) -> Iterator[tuple[Path, str]]:
    """A container's layer after the RUN that aligns (not the machine's files), and the interpreter
    in it."""
    upper = Path(tempfile.mkdtemp(prefix="page-primer-test-", dir="/srv"))
    try:
        require_huge_files(upper)
        aligns = {
            steps(block("containers.md", page))["RUN"].rpartition("&& page-primer ")[2]
            for page in ("FROM python", "FROM debian")
        }
        (align,) = aligns  # the same for both
        if Path(sys.prefix).parts[1] not in OVERLAID:  # its libraries are the machine's
            rest = align.replace("--libraries ", "")
            align = f"align && {public_python} -m page_primer {rest}"
        run = ["sh", "-c", f"{public_python} -m page_primer {align}"]
        done = subprocess.run([*container(upper, 0), *run], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        yield upper, public_python
    finally:
        shutil.rmtree(upper)


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize("recipe", [docker_run, compose, kubernetes])
def test_container(built, public, recipe):
    """A user without rights, a root that nobody can write to, and aligned files: huge as they are,
    and locked as far as the limit goes; the kernel's memory limit is not reached."""
    upper, python = built
    settings = recipe()
    lines = steps(block("containers.md", "FROM debian"))
    entry, command = json.loads(lines["ENTRYPOINT"]), json.loads(lines["CMD"])
    assert (entry, command[0]) == (["page-primer-warm", "--"], "gunicorn")
    port = free_port()
    (public / "shop.py").write_text(APP)
    words = [WARM, "--", python, "-m", *command]
    words[words.index("0.0.0.0:8000")] = f"127.0.0.1:{port}"
    limit = settings.memlock or 8 << 20
    limit = min(limit, allowed_memlock(limit))
    with Cgroup(settings.memory) as cgroup, open(public / "log", "wb") as log:
        wrapper = [*cgroup.wrapper, "prlimit", f"--memlock={limit}:{limit}"]
        run = [*wrapper, *container(upper, settings.user, read_only=True), *words]
        env = {**os.environ, "HOME": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
        process = subprocess.Popen(run, cwd=public, env=env, stdout=log, stderr=log)
        try:
            wait_for(lambda: get(port), "an answer")
            answered: set[bytes] = set()

            def all_have() -> bool:
                answered.add(get(port))
                return len(answered) == 4

            wait_for(all_have, "an answer of each worker")
            pids = [process.pid, *map(int, answered)]
            check_interpreter(pids)
            for pid in pids:
                assert status_of(pid)["Uid"].split()[0] == str(settings.user)
                copies = f"/page-primer-{settings.user}/", "/memfd:", "/.cache/"
                assert not [v for v in outside.smaps(pid) if any(c in v.path for c in copies)]
            assert os.listdir(os.path.join(f"/proc/{process.pid}/root", "dev/shm")) == []
            assert cgroup.oom_kills == 0
        finally:
            process.terminate()
            process.wait(60)
    text = (public / "log").read_text()
    ours = [line for line in text.splitlines() if "page-primer:" in line]
    assert "huge already" in ours[0], text
    assert not [line for line in ours if "[INFO]" not in line], text


# ------------------------------------------------------------------------------------- systemd


class Shop:
    """The service of docs/deploy/systemd.md: the unit as it is written there, with the interpreter,
    the directory and the port of this test."""

    def __init__(self, unit: str, python: str, directory: Path) -> None:
        self.port = free_port()
        (directory / "shop.py").write_text(APP)
        unit = unit.replace("/opt/shop/bin/gunicorn", f"{python} -m gunicorn")
        unit = unit.replace("/opt/shop/bin/page-primer", f"{python} -m page_primer")
        self.unit = unit.replace("/opt/shop", str(directory)).replace(":8000", f":{self.port}")
        # What the sandbox hides here, since tests live in temporary directories.
        needed = {str(directory), os.path.dirname(os.path.dirname(os.path.dirname(python)))}
        needed |= {os.path.dirname(os.path.dirname(page_primer.__file__))}
        needed |= {sysconfig.get_path("purelib")}
        self.drop_in = (
            f"[Service]\nBindReadOnlyPaths={' '.join(sorted(needed))}\n"
            "StandardError=append:/run/shop.log\nEnvironment=PYTHONDONTWRITEBYTECODE=1\n"
        )

    @property
    def units(self) -> dict[str, str]:
        return {"shop.service": self.unit, "shop.service.d/test.conf": self.drop_in}

    def wait_until_each_answered(self, systemd: Systemd) -> tuple[int, list[int]]:
        """Returns the master and the workers."""
        wait_for(lambda: get(self.port), "an answer")
        answered: set[bytes] = set()

        def all_have() -> bool:
            answered.add(get(self.port))
            return len(answered) == 4

        wait_for(all_have, "an answer of each worker")
        master, *workers = systemd.processes("shop.service")
        assert len(workers) == 4
        return master, workers


def status_of(pid: int) -> dict[str, str]:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (row.partition(":") for row in rows)}


def own_number(pid: int) -> int:
    """A process's number in its own PID namespace."""
    return int(status_of(pid)["NSpid"].split()[-1])


def allowed_memlock(limit: int) -> int:
    """The limit, as far as we may raise it here."""
    raise_it = ["prlimit", f"--memlock={limit}:{limit}", "true"]
    if subprocess.run(raise_it, capture_output=True).returncode:  # no CAP_SYS_RESOURCE
        return resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return limit


def check_sandbox(pid: int, limit: int) -> None:
    """The settings of the unit are in force."""
    status = status_of(pid)
    assert status["Uid"].split()[0] != "0"
    assert (status["CapEff"], status["CapBnd"], status["NoNewPrivs"]) == ("0" * 16, "0" * 16, "1")
    assert status["Seccomp"] == "2"
    limit = allowed_memlock(limit)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert re.search(rf"Max locked memory +{limit} +{limit} ", limits), limits
    root = next(line.split() for line in open(f"/proc/{pid}/mountinfo") if line.split()[4] == "/")
    assert "ro" in root[5].split(",")


def said(systemd: Systemd) -> list[str]:
    """page-primer's lines in the service's log: those of DEBUG are not in it."""
    log = systemd.path("/run/shop.log").read_text()
    return [line for line in log.splitlines() if "page-primer:" in line]


def images(pid: int, store: str) -> list[outside.Vma]:
    """The mappings of a process that are of images in a store; all their whole huge pages with code
    are huge."""
    found = [vma for vma in outside.smaps(pid) if vma.path.startswith(store)]
    for vma in found:
        low = -(-vma.start // outside.PMD) * outside.PMD
        high = vma.end // outside.PMD * outside.PMD
        if "x" in vma.perms and high > low:
            assert vma.huge == high - low, vma
    return found


def check_interpreter(pids: list[int]) -> None:
    for pid in pids:
        text = outside.text_of(pid)
        assert text.huge == text.attainable > 0, text
        assert text.locked, text


@pytest.mark.slow
@needs_root
def test_systemd_with_a_cache_directory(public, public_python):
    """A user of this start alone, nothing writable but its cache, and no memory that was writable
    becomes executable; twice, since the second user is given what the first one wrote."""
    require_huge_files(public)
    shop = Shop(block("systemd.md", "[Unit]"), public_python, public)
    with Systemd(shop.units) as systemd:
        before: list[str] = []
        for _ in range(2):
            systemd.start("shop.service")
            master, workers = shop.wait_until_each_answered(systemd)
            check_sandbox(master, 256 << 20)
            check_interpreter([master, *workers])
            for pid in (master, *workers):
                assert images(pid, "/var/cache/private/shop/page-primer/"), said(systemd)
            lines = said(systemd)
            assert "image in /var/cache/shop/page-primer" in lines[0], lines
            assert not [line for line in lines if "[INFO]" not in line], lines
            store = systemd.path("/var/cache/private/shop/page-primer")
            names = sorted(path.name for path in store.rglob("*"))
            before = before or names
            assert names == before
            systemd.stop("shop.service")
            systemd.path("/run/shop.log").unlink()


@pytest.mark.slow
@needs_root
def test_systemd_with_a_store_that_root_has_filled(public, public_python):
    """8 MiB of RLIMIT_MEMLOCK, nothing to write to: the interpreter and the libraries' hot chunks
    are on huge pages, the log has one line, and the service can lock memory of its own."""
    require_huge_files(public)
    shop = Shop(block("systemd.md", "[Unit]", 1), public_python, public)
    with Systemd(shop.units) as systemd:
        systemd.start("shop.service")
        master, workers = shop.wait_until_each_answered(systemd)
        check_sandbox(master, 8 << 20)
        check_interpreter([master, *workers])
        crypto = [vma for vma in outside.smaps(master) if "libcrypto" in vma.path]
        for pid in (master, *workers):
            found = images(pid, "/var/cache/page-primer/")
            assert found
            if min(vma.start for vma in crypto) % outside.PMD == 0:
                assert any("libcrypto" in vma.path and vma.huge for vma in found), found
        lines = said(systemd)
        assert len(lines) == 1, lines
        (line,) = lines
        assert "[INFO]" in line and "not locked (over RLIMIT_MEMLOCK)" in line
        locked = {get(shop.port, "/lock").decode() for _ in range(12)}
        assert locked <= {str(own_number(pid)) for pid in workers}, locked
        # Written by root, and not by the service.
        store = systemd.path("/var/cache/page-primer")
        assert {path.lstat().st_uid for path in store.rglob("*")} == {0}
        assert not systemd.path("/var/cache/private/shop").exists()


def test_units_are_what_systemd_understands(tmp_path):
    """No unknown setting, no wrong value."""
    for number, page in enumerate(("systemd.md", "systemd.md", "../warm.md")):
        unit = block(page, "[Unit]", number % 2)
        path = tmp_path / f"shop{number}.service"
        path.write_text(unit.replace("/opt/shop/bin/gunicorn", "/bin/true")
                        .replace("/opt/venv/bin/page-primer-warm", "/bin/true")
                        .replace("/opt/shop/bin/page-primer", "/bin/true")
                        .replace("/opt/shop", "/"))  # fmt: skip
        try:
            done = subprocess.run(
                ["systemd-analyze", "verify", str(path)], capture_output=True, text=True
            )
        except FileNotFoundError:
            pytest.skip("systemd-analyze is not installed")
        assert (done.returncode, path.name in done.stderr) == (0, False), done.stderr
