"""Memory cgroups of our own, to be removed afterwards; version 1 or 2, whichever is here."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from types import TracebackType

import pytest


def _parent() -> tuple[str, int]:
    """The directory of a cgroup that may have limited children, and the version."""
    with open("/proc/self/mountinfo") as file:
        rows = [line.split() for line in file]
    for row in rows:
        kind, options = row[row.index("-") + 1], row[-1].split(",")
        if kind == "cgroup" and "memory" in options:
            return row[4], 1
    for row in rows:
        if row[row.index("-") + 1] == "cgroup2":
            with contextlib.suppress(OSError), open(f"{row[4]}/cgroup.subtree_control") as file:
                if "memory" in file.read().split():
                    return row[4], 2
    raise OSError("no memory controller is mounted, or none is delegated")


class Cgroup:
    """A memory cgroup with a limit in bytes. Where none can be made the test is skipped."""

    path: str
    version: int

    def __init__(self, limit: int, *, inside: Cgroup | None = None) -> None:
        try:
            parent, self.version = (inside.path, inside.version) if inside else _parent()
            self.path = f"{parent}/page-primer-{uuid.uuid4().hex[:12]}"
            if inside and self.version == 2:
                self._write("cgroup.subtree_control", "+memory", inside.path)
            os.mkdir(self.path)
        except OSError as error:
            pytest.skip(f"memory cgroups cannot be made here: {error}")
        self.limit = limit

    @property
    def limit(self) -> int:
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = limit
        self._write(self.limit_file, str(limit))

    @property
    def limit_file(self) -> str:
        return "memory.max" if self.version == 2 else "memory.limit_in_bytes"

    def _write(self, name: str, text: str, directory: str | None = None) -> None:
        with open(f"{directory or self.path}/{name}", "w") as file:
            file.write(text)

    def read(self, name: str) -> str:
        with open(f"{self.path}/{name}") as file:
            return file.read()

    @property
    def wrapper(self) -> list[str]:
        """A prefix that runs a command in this cgroup."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    @property
    def usage(self) -> int:
        name = "memory.current" if self.version == 2 else "memory.usage_in_bytes"
        return int(self.read(name))

    @property
    def peak(self) -> int:
        """The most that it ever had."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int(self.read(name))

    @property
    def oom_kills(self) -> int:
        name = "memory.events" if self.version == 2 else "memory.oom_control"
        rows = dict(line.split() for line in self.read(name).splitlines())
        return int(rows["oom_kill"])

    def __enter__(self) -> Cgroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for attempt in range(100):
            try:
                os.rmdir(self.path)
            except OSError:
                # Its last processes have ended, but not to the last bit.
                if attempt == 99:
                    raise
                time.sleep(0.05)
            else:
                return
