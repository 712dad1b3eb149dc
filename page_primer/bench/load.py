"""Requests for a server: by h2load where that is installed, by aiohttp otherwise.

h2load (nghttp2, of every distribution: Debian's nghttp2-client) sends an exact number of requests,
so that rounds are paired over the same work, alternates between URLs, reconnects where a server
closes connections, and writes status and latency of every request to a file. (wrk sends for a
time, not a number; its last release is of 2021.) Of load generators on PyPI, those that are well
kept (locust) need more processor time for a request than most servers do. aiohttp is the client
that is, and all it lacks is a loop.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from page_primer.bench.failures import CutShort, Failure

if TYPE_CHECKING:
    from collections.abc import Sequence

H2LOAD, AIOHTTP = "h2load", "aiohttp"
_NONE = (
    "no load generator: install h2load (Debian and Ubuntu: apt install nghttp2-client), or "
    'pip install "page-primer[bench]" for one in Python'
)
_SECONDS = 600.0  # for one run; a server that hangs is not waited for longer


@dataclass(frozen=True)
class Load:
    """What came back: latencies in seconds, ascending."""

    seconds: float
    latencies: tuple[float, ...]

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def quantile(self, share: float) -> float:
        """The latency that this share of the requests did not exceed."""
        return self.latencies[max(0, math.ceil(share * len(self.latencies)) - 1)]


def generator() -> str:
    """The load generator to use.

    Raises:
        Failure: there is none.
    """
    if shutil.which(H2LOAD):
        return H2LOAD
    if importlib.util.find_spec(AIOHTTP):
        return AIOHTTP
    raise Failure(_NONE)


def send(
    name: str, urls: Sequence[str], requests: int, connections: int, helpers: set[int]
) -> Load:
    """Send requests, and wait for the answers.

    Args:
        name: generator()'s.
        requests: how many, over all URLs in turn.
        connections: at a time.
        helpers: the ids of processes that are no part of the server.

    Raises:
        CutShort: not all were answered, or one with an error.
    """
    connections = min(connections, requests)
    if name == H2LOAD:
        answers, seconds = _by_h2load(urls, requests, connections, helpers)
    else:
        answers, seconds = _by_aiohttp(urls, requests, connections, helpers)
    failed = [status for status, _ in answers if not 200 <= status < 400]
    if failed or len(answers) < requests:
        what = f"{requests - len(answers) + len(failed)} of {requests} requests failed"
        statuses = sorted({status for status in failed if status > 0})
        raise CutShort(what + (f" (status {', '.join(map(str, statuses))})" if statuses else ""))
    return Load(seconds, tuple(sorted(latency for _, latency in answers)))


def run_helper(
    command: Sequence[str], helpers: set[int], text: str | None = None
) -> tuple[int, str]:
    """Run a program that is no part of the server; its status, and its output and errors.

    Raises:
        CutShort: it took too long.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", start_new_session=True,  # Ctrl-C is ours
    )  # fmt: skip
    helpers.add(process.pid)
    try:
        out, _ = process.communicate(text, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise CutShort(f"no answer to all requests within {_SECONDS:.0f} s") from None
    finally:
        process.kill()  # nothing where it has ended
        process.wait()
        helpers.discard(process.pid)
    return process.returncode, out


def _by_h2load(
    urls: Sequence[str], requests: int, connections: int, helpers: set[int]
) -> tuple[list[tuple[int, float]], float]:
    with tempfile.TemporaryDirectory(prefix="page-primer-bench-") as directory:
        log = os.path.join(directory, "log")
        status, out = run_helper(
            [H2LOAD, "--h1", "--requests", str(requests), "--clients", str(connections),
             "--threads", "1", "--connection-inactivity-timeout", "60",
             "--log-file", log, *urls], helpers,
        )  # fmt: skip
        if status or not os.path.exists(log):
            raise CutShort(f"h2load ended with status {status}: {out.strip().splitlines()[-1:]}")
        with open(log, encoding="ascii") as file:
            rows = [tuple(map(int, line.split("\t"))) for line in file]
    answers = [(code, micro / 1e6) for _, code, micro in rows]
    if not rows:
        return [], 1.0
    ended = max(start + micro for start, _, micro in rows)
    return answers, max(ended - min(row[0] for row in rows), 1) / 1e6


# Its own process, so that it runs beside this one's progress and on its own core.
_CLIENT = """
import asyncio, json, sys, time
import aiohttp

async def main(urls, requests, connections):
    answers, numbers = [], iter(range(requests))
    timeout = aiohttp.ClientTimeout(total=60)
    connector = aiohttp.TCPConnector(limit=0, ssl=False)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        async def client():
            for number in numbers:
                began = time.perf_counter()
                try:
                    async with session.get(urls[number % len(urls)],
                                           allow_redirects=False) as answer:
                        await answer.read()
                        status = answer.status
                except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
                    status = -1
                answers.append([status, time.perf_counter() - began])
        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(connections)))
        return [answers, time.perf_counter() - began]

print(json.dumps(asyncio.run(main(*json.load(sys.stdin)))))
"""


def _by_aiohttp(
    urls: Sequence[str], requests: int, connections: int, helpers: set[int]
) -> tuple[list[tuple[int, float]], float]:
    asked = json.dumps([list(urls), requests, connections])
    status, out = run_helper([sys.executable, "-c", _CLIENT], helpers, asked)
    try:
        answers, seconds = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        last = (out.strip().splitlines() or ["no output"])[-1]
        raise CutShort(f"aiohttp's client ended with status {status}: {last}") from None
    return [(status, latency) for status, latency in answers], seconds
