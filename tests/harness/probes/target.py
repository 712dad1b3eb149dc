"""A gunicorn worker that tools look at: its interpreter, how it is primed, what it is doing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness import outside
from harness.gunicorn_server import CONF
from harness.servers import NO_CONTROL_SOCKET, Server, children, free_port, get, wait_for

__all__ = ["UNPRIMED", "Failed", "NotHere", "Shape", "Target", "Way", "build_module", "ways"]

HERE = Path(__file__).parent


class NotHere(Exception):
    """The tool is not to be had here, or not for this target; the message says why."""


class Failed(Exception):
    """The tool ran and did not do its work; the message is what it said."""


@dataclass(frozen=True)
class Shape:
    """An interpreter to serve with. `aligned` is a copy of it that `page-primer align` has aligned,
    and `env` what that needs to find its libpython."""

    name: str
    python: str
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    aligned: Shape | None = None


@dataclass(frozen=True)
class Way:
    """How a server is primed: its environment; `aligned`: the shape's aligned copy serves."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict, hash=False)
    aligned: bool = False


UNPRIMED = Way("unprimed", {"PAGE_PRIMER": "0"})


def ways(disk: Path, memory: Path) -> list[Way]:
    """The ways of priming.

    Args:
        disk: a directory for images, on a file system that has huge pages for files.
        memory: another, on a tmpfs.
    """
    return [
        Way("image on disk", {"PAGE_PRIMER_BACKING": "image", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("image on tmpfs",
            {"PAGE_PRIMER_BACKING": "image", "PAGE_PRIMER_IMAGE_DIR": str(memory)}),
        Way("memfd", {"PAGE_PRIMER_BACKING": "memfd", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("anonymous", {"PAGE_PRIMER_BACKING": "anonymous", "PAGE_PRIMER_IMAGE_DIR": str(disk)}),
        Way("anonymous, perf map",
            {"PAGE_PRIMER_BACKING": "anonymous", "PAGE_PRIMER_IMAGE_DIR": str(disk),
             "PAGE_PRIMER_PERF_MAP": "1"}),
        Way("not primed", UNPRIMED.env, aligned=True),
        Way("primed", {"PAGE_PRIMER_IMAGE_DIR": str(disk)}, aligned=True),
    ]  # fmt: skip


def build_module(directory: Path) -> None:
    """Build the extension module that the application uses, for every CPython from 3.10 on."""
    include = sysconfig.get_path("include")
    command = ["g++", "-g", "-O1", "-fPIC", "-shared", f"-I{include}", str(HERE / "frames.cpp"),
               "-o", str(directory / "frames.abi3.so")]  # fmt: skip
    subprocess.run(command, check=True)


class Target:
    """A gunicorn with one worker that serves toolsapp.py, and where the worker is at the moment."""

    def __init__(self, shape: Shape, way: Way, module: Path, *, late: bool = False) -> None:
        """
        Args:
            shape: what serves.
            way: how it is primed.
            module: the directory of build_module().
            late: do not prime before the request for it.
        """
        if way.aligned:
            if shape.aligned is None:
                raise NotHere("there is no aligned copy")
            shape = shape.aligned
        self.shape, self.way = shape, way
        self.directory = Path(tempfile.mkdtemp(prefix="page-primer-tools-"))
        shutil.copy(HERE / "toolsapp.py", self.directory)
        # One file, so that one image serves all.
        os.symlink(module / "frames.abi3.so", self.directory / "frames.abi3.so")
        os.mkfifo(self.directory / "release")
        port = free_port()
        conf = [] if late else ["-c", CONF]
        command = [
            shape.python, "-m", "gunicorn", *conf, "--chdir", str(self.directory),
            "--bind", f"127.0.0.1:{port}", "--timeout", "600", "--log-level", "debug",
            *NO_CONTROL_SOCKET, "toolsapp:app",
        ]  # fmt: skip
        env = {"PAGE_PRIMER_MLOCK": "0", **shape.env, **way.env}
        self.server = Server(self.directory, port, *command, env=env)

    def __enter__(self) -> Target:
        self.server.__enter__()
        (self.pid,) = children(self.server.pid)
        # Until the interpreter has specialised what it will: calls from Python to Python then take
        # other frames of C.
        for _ in range(50):
            self.get("warm")
        return self

    def __exit__(self, *_: object) -> None:
        processes = self.server.family()
        try:
            self.server.__exit__()
        finally:
            shutil.rmtree(self.directory)
            for pid in {*processes, self.pid}:  # a worker may have been killed, and another started
                Path(f"/tmp/perf-{pid}.map").unlink(missing_ok=True)

    def get(self, path: str) -> str:
        return get(self.server.port, f"/{path}", seconds=300).decode()  # while tools look

    def require_primed(self) -> None:
        """Raises Failed unless the worker's code is where this way puts it; NotHere if by its own
        report there was nothing to put there."""
        if self.way.aligned:
            self.require_huge()
            return
        wanted = self.way.env.get("PAGE_PRIMER_BACKING", "image")
        pattern = r"page-primer: ([\d.]+) % of .* on huge pages(?: \((\w+))?"
        said = re.search(pattern, self.server.log())
        if said and not float(said[1]) and not said[2]:
            raise NotHere(f"nothing to move: {said[0]}")
        if said is None or said[2] != wanted:
            raise Failed(f"not primed: {said[0] if said else self.server.log()}")
        text = outside.text_of(self.pid)
        # What may be left for profilers is the head of what has a random address.
        whole = text.fixed or (wanted == "image" and self.interpreter.endswith(".so.1.0"))
        if not (text.is_huge if whole else text.huge):
            raise Failed(f"not primed: {text}")

    def require_huge(self) -> None:
        """Raises Failed unless all whole huge pages of the code are huge on the interpreter's own
        file; NotHere if the kernel gives such files none."""
        text = outside.text_of(self.pid)
        if any(vma.path != text.path for vma in text.span_vmas):
            raise Failed(f"moved: {text}")
        if text.huge < text.attainable or not text.attainable:
            raise NotHere(f"the kernel gave {text.huge} of {text.attainable} bytes of code huge")
        if self.way.env.get("PAGE_PRIMER") != "0" and "huge already" not in self.server.log():
            raise Failed("the log does not say that the code is huge already")

    @property
    def alive(self) -> bool:
        return self.get("") == "ok" and children(self.server.pid) == [self.pid]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The worker stays in a request, under Python's and C's frames, in open(2) of a FIFO."""

        def ask() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):  # the worker was killed
                self.get("hold")

        request = threading.Thread(target=ask)
        request.start()
        held = ("fifo", "partner")
        wchan = Path(f"/proc/{self.pid}/wchan")
        wait_for(lambda: any(word in wchan.read_text() for word in held), "the request to hold")
        try:
            yield
        finally:
            while request.is_alive():
                with contextlib.suppress(OSError):  # nobody there yet, or no longer
                    os.close(os.open(self.directory / "release", os.O_WRONLY | os.O_NONBLOCK))
                request.join(0.05)

    @contextlib.contextmanager
    def spinning(self) -> Iterator[None]:
        """The worker works, request after request."""
        enough = self.directory / "enough"

        def ask() -> None:
            while not enough.exists():
                self.get("spin")

        load = threading.Thread(target=ask)
        load.start()
        time.sleep(0.2)
        try:
            yield
        finally:
            enough.touch()
            load.join()
            enough.unlink()

    @property
    def interpreter(self) -> str:
        return outside.interpreter_file(self.pid)

    @property
    def interpreter_image(self) -> str:
        """The path of the file that the interpreter's code is mapped from."""
        address = json.loads(self.get("addresses"))["PyEval_EvalCode"]
        return next(v.path for v in outside.smaps(self.pid) if v.start <= address < v.end)
