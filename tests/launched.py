"""Processes that `page-primer run` starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import outside

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


def check_native(pids):
    """All attainable .text is on huge pages and locked in each process, which was started from an
    image; returns the measurements."""
    texts = [outside.text_of(pid) for pid in pids]
    for text in texts:
        assert "-native-" in text.path, text
        assert text.huge == text.attainable > 0, text
        assert text.locked and text.executable, text
    return texts


def is_native(pid):
    text = outside.text_of(pid)
    return "-native-" in text.path and text.locked
