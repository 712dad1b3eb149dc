"""What a variant has for itself, so that several can run at the same time: `{port}`, in the command
and in URLs, is a free port, and `{queue}`, in the command of a Celery worker, a queue of tasks."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from page_primer.bench.server import Address

if TYPE_CHECKING:
    from collections.abc import Sequence

PORT, QUEUE = "{port}", "{queue}"
_HIGHEST = "65535"


def can_be_many(command: Sequence[str]) -> bool:
    """Whether the command of a server can be run several times at once."""
    return _has(command, PORT) or _has(command, QUEUE)


def check(command: Sequence[str], urls: Sequence[str], *, task: bool) -> None:
    """URLs must be valid, and a placeholder must be on both sides.

    Raises:
        ValueError: they are not; the message says which.
    """
    port, queue = _has(command, PORT), _has(command, QUEUE)
    for url in urls:
        Address.of(url.replace(PORT, _HIGHEST))
        if port != (PORT in url):
            raise ValueError(
                f"--url: {url}: {PORT} is in " + ("the command" if port else "it") + ", but not in "
                + ("it" if port else "the command")
            )  # fmt: skip
    if queue and urls:
        raise ValueError(f"bench: {QUEUE} in the command is for --celery-task")
    if port and task:
        raise ValueError(f"bench: {PORT} in the command is for --url")


@dataclass(frozen=True)
class Place:
    """Of one variant: what fills its placeholders, and where it is asked."""

    port: str
    queue: str
    addresses: tuple[Address, ...]

    @classmethod
    def of(cls, name: str, command: Sequence[str], urls: Sequence[str]) -> Place:
        """A port that is free now; a queue of this process's by the variant's name, or the empty
        string."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        queue = f"page-primer-bench-{os.getpid()}-{name}" if _has(command, QUEUE) else ""
        return cls(port, queue, tuple(Address.of(url.replace(PORT, port)) for url in urls))

    def fill(self, command: Sequence[str]) -> list[str]:
        """The command with what the place has."""
        return [word.replace(PORT, self.port).replace(QUEUE, self.queue) for word in command]


def _has(command: Sequence[str], placeholder: str) -> bool:
    return any(placeholder in word for word in command)
