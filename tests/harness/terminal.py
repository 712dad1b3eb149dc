"""A terminal of any width for a command under test."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from collections.abc import Sequence


def on_terminal(
    *command: str, columns: int = 80, statuses: Sequence[int] = (0,), **environ: str
) -> str:
    """What a command writes to a terminal, until it ends with one of these statuses."""
    given = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    given |= {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environ}
    master, slave = pty.openpty()
    try:
        with subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, env=given) as process:
            os.close(slave)
            written = b""
            while True:
                try:
                    part = os.read(master, 1 << 16)
                except OSError:  # the other end is closed: a terminal's end of file
                    break
                written += part
            assert process.stderr is not None
            error = process.stderr.read()
            assert process.wait(100) in statuses, error
        return written.decode().replace("\r\n", "\n")
    finally:
        os.close(master)


def without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)
