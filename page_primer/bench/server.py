"""One life of the user's server: its start until it answers, and its end."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from page_primer.bench.failures import Failure
from page_primer.bench.tree import dies_with_us

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from page_primer.bench.tree import Adopted

_LOOK_SECONDS = 0.005
_ANSWER_SECONDS = 30.0
_UNWELL_SECONDS = 5.0  # how long a server may answer with 5xx as it starts


class Address(NamedTuple):
    """A URL in its parts."""

    url: str
    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> Address:
        """
        Raises:
            ValueError: it is no http or https URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError as error:
            raise ValueError(f"--url: {url!r} is no http:// or https:// URL: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url: {url!r} is no http:// or https:// URL")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(url, parts.scheme == "https", parts.hostname, port, path)

    def listening(self) -> bool:
        """Whether anything accepts connections there."""
        with contextlib.suppress(OSError):
            socket.create_connection((self.host, self.port), 2).close()
            return True
        return False

    def get(self) -> int:
        """The status of the answer.

        Raises:
            OSError, http.client.HTTPException: there is none.
        """
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_ANSWER_SECONDS)
        if self.secure:  # whoever measures a server on this machine knows its certificate
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = http.client.HTTPSConnection(
                self.host, self.port, timeout=_ANSWER_SECONDS, context=context
            )
        with contextlib.closing(connection):
            connection.request("GET", self.path)
            answer = connection.getresponse()
            answer.read()
            return answer.status


class Process:
    """A command of the user's, in a session of its own, with its output in a file.

    Attributes:
        tree: its processes: all that are no helpers, or, where it is not `alone`, its session's.
        began: when it was started, by time.monotonic().
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        tree: Adopted,
        *,
        alone: bool,
        dies_by: signal.Signals = signal.SIGTERM,  # should this process be killed
    ) -> None:
        self._command, self._environ, self._alone = list(command), dict(environ), alone
        self._dies_by = dies_by
        self.tree = tree
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self._process: subprocess.Popen[bytes] | None = None
        self.began = 0.0

    def __enter__(self) -> Process:
        self.began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                self._command, env=self._environ, stdin=subprocess.DEVNULL, stdout=self._output,
                stderr=self._output, start_new_session=True,
                preexec_fn=dies_with_us(self._dies_by),
            )  # fmt: skip
        except OSError as error:
            self._output.close()
            raise Failure(f"{self._command[0]}: {error.strerror}") from None
        except subprocess.SubprocessError as error:
            raise Failure(f"{self._command[0]}: {error}") from None
        if not self._alone:
            self.tree = self.tree.only(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.tree.stop()
        self._output.close()

    def ended(self, within: float = 0.0) -> str | None:
        """How it ended, with the last line of its output; None while it runs.

        Args:
            within: seconds to wait for that: its connections end before it does.
        """
        assert self._process is not None
        end = time.monotonic() + within
        while (status := self._process.poll()) is None and time.monotonic() < end:
            time.sleep(_LOOK_SECONDS)
        if status is None:
            return None
        if status < 0:
            with contextlib.suppress(ValueError):
                return f"ended by {signal.Signals(-status).name}{self.last_words()}"
        return f"ended with status {status}{self.last_words()}"

    def run_to_end(self) -> tuple[resource.struct_rusage, float]:
        """Wait for its end; what it and the descendants that it waited for used, and seconds."""
        assert self._process is not None
        usage = self._reaped(0)
        assert usage is not None
        return usage, time.monotonic() - self.began

    def run_on(self, seconds: float) -> resource.struct_rusage | None:
        """Let a paused command go on, and pause it again; what it used if it has ended."""
        end = time.monotonic() + seconds
        self._signal(signal.SIGCONT)
        while (usage := self._reaped(os.WNOHANG)) is None:
            if time.monotonic() > end:
                self.pause()
                break
            time.sleep(_LOOK_SECONDS)
        return usage

    def pause(self) -> None:
        """Stop its processes where they are."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        asked: set[int] = set()
        while new := set(self.tree.processes()) - asked:  # what they started meanwhile, too
            for pid in new:
                with contextlib.suppress(OSError):  # it has ended, or is another user's
                    os.kill(pid, number)
            asked |= new

    def _reaped(self, options: int) -> resource.struct_rusage | None:
        assert self._process is not None
        pid, status, usage = os.wait4(self._process.pid, options)
        if not pid:
            return None
        self._process.returncode = os.waitstatus_to_exitcode(status)
        return usage

    def failed(self) -> str | None:
        """As ended(), but None for success."""
        assert self._process is not None
        return self.ended() if self._process.returncode else None

    def last_words(self) -> str:
        """The last line of the output that is not empty, as the rest of a sentence."""
        size = os.fstat(self._output.fileno()).st_size
        tail = os.pread(self._output.fileno(), 8192, max(0, size - 8192))
        lines = [line.strip() for line in tail.decode(errors="replace").splitlines()]
        lines = [line for line in lines if line]
        return f": {lines[-1][:300]}" if lines else ""

    def wait_for(self, addresses: Sequence[Address], seconds: float) -> float:
        """Wait until every URL is answered; returns how many seconds the first answer took.

        Raises:
            Failure: the server ended, stays silent, or answers with an error.
        """
        first: float | None = None
        end = self.began + seconds
        for address in addresses:
            unwell: float | None = None
            while True:
                now = time.monotonic()
                if why := self.ended():
                    raise Failure(f"the server {why}, before it answered {address.url}")
                status = self._status_of(address)
                if status and status < 400:
                    first = first or time.monotonic() - self.began
                    break
                unwell = unwell or (now if status else None)
                if status and (status < 500 or now > (unwell or now) + _UNWELL_SECONDS):
                    raise Failure(f"{address.url} is answered with status {status}")
                if now > end:
                    raise Failure(f"no answer from {address.url} within {seconds:.0f} s"
                                  f"{self.last_words()}")  # fmt: skip
                time.sleep(_LOOK_SECONDS)
        assert first is not None
        return first

    def _status_of(self, address: Address) -> int:
        """0 for no answer."""
        try:
            return address.get()
        except (OSError, http.client.HTTPException):
            return 0


def check_free(addresses: Sequence[Address]) -> None:
    """
    Raises:
        Failure: something else serves one of the URLs.
    """
    for address in addresses:
        if address.listening():
            raise Failure(
                f"port {address.port} of {address.host} is in use by another process: "
                "stop it, or give this server another port"
            )
