"""A process under test, driven from here and looked at from outside."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from harness.kernel_log import watch

DRIVER = str(Path(__file__).with_name("driver.py"))


class Failed(Exception):
    """The statements raised; the message says what."""


class Process:
    """A Python process that executes statements for us.

    `wrapper` is put before the interpreter on the command line (setpriv, unshare, prlimit).
    """

    def __init__(
        self,
        python: str,
        *,
        env: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        self._process = subprocess.Popen(
            [*wrapper, python, *options, DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            text=True,
        )
        self.pid = self.run("import os; result = os.getpid()")
        watch(self.pid)

    def run(self, source: str) -> Any:
        """Execute statements there; what they assign to `result` comes back."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(source) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise Failed(f"the process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["result"]

    def prime(self, **options: Any) -> dict[str, Any]:
        """prime() there; the report as a dict."""
        return self.run(
            "import page_primer\n"
            f"report = page_primer.prime(**{options!r})\n"
            "result = report.as_dict()"
        )

    def restore(self) -> dict[str, Any]:
        return self.run("import page_primer; result = page_primer.restore().as_dict()")

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            status = self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
        if value is None:
            assert status == 0, f"the process ended with status {status}"


def interpreter(report: Mapping[str, Any]) -> dict[str, Any]:
    """The interpreter's own object in a report."""
    return next(obj for obj in report["objects"] if obj["interpreter"])


def left_of(report: Mapping[str, Any], name: str) -> dict[str, int]:
    """Why code of the object with this file name was left alone: reason -> bytes."""
    found: dict[str, int] = {}
    for obj in report["objects"]:
        if os.path.basename(obj["path"]) == name:
            for segment in obj["segments"]:
                if segment["kind"] == "code":
                    found.update(segment["left"])
    return found
