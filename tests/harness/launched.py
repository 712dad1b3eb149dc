"""Processes that `page-primer run` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from harness import outside

LAUNCHER = str(Path(sys.executable).with_name("page-primer"))
RUN = [LAUNCHER, "run", "--"]


def environment(images, **more):
    return {**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images), **more}


def run(command, images=None, *, env=None, launcher=(), **options):
    """Run a command to its end; under the launcher where there is a directory for images."""
    env = {**(environment(images) if images else os.environ), **(env or {})}
    if images:
        command = [LAUNCHER, "run", *launcher, "--", *command]
    return subprocess.run(command, env=env, capture_output=True, text=True, **options)


def check_primed(pids):
    """All attainable .text of the interpreter is on huge pages and locked in each process; returns
    the measurements."""
    texts = [outside.text_of(pid) for pid in pids]
    for text in texts:
        text.require_huge()
        assert text.locked and text.executable, text
    return texts


def is_primed(pid, path=None):
    """Whether that is so by now: the process may be about to execute the interpreter yet."""
    try:
        text = outside.text_of(pid, path)
    except (OSError, StopIteration, AttributeError):
        return False
    return text.is_huge and bool(text.attainable or text.phase) and text.locked
