"""perf record around what a test does, however long perf takes to begin on a busy machine."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

__all__ = ["Recording", "recording"]


class Recording:
    """What perf says, and whether it still records."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.said = ""
        self._process = process

    @property
    def running(self) -> bool:
        return self._process.poll() is None


@contextlib.contextmanager
def recording(perf: str, *options: str) -> Iterator[Recording]:
    """Run `perf record` until the block is left. The block is entered when perf records.

    Args:
        perf: the program, and what comes before `record`.
        options: of `perf record`.
    """
    # Its command is started when all events are there, and ends with our end of the pipe.
    command = [*perf.split(), "record", "-q", *options, "--", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        found = Recording(process)
        try:
            found.said = process.stdout.readline()
            yield found
        finally:
            found.said += process.communicate(timeout=120)[0]
