"""What the ASGI and WSGI middleware costs a request: two servers, with it and without, asked in
turns over one connection each; requests per second as a ratio.

    python benchmarks/middleware.py [--rounds 15] [--requests 2000]

Both servers run at the same time, and neither is primed (PAGE_PRIMER=0), so that the difference is
the middleware's call alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
from page_primer.integrations.asgi import primed
wrapped = primed(app)
"""
WSGI = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
from page_primer.integrations.wsgi import primed
wrapped = primed(app)
"""
SERVERS = {
    "ASGI, uvicorn": (ASGI, ["-m", "uvicorn", "--log-level", "error", "--port"]),
    "WSGI, waitress": (WSGI, ["-m", "waitress", "--listen"]),
}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def connect(port: int) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def rate(connection: socket.socket, requests: int) -> float:
    """Requests per second over one kept connection."""
    began = time.perf_counter()
    for _ in range(requests):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\nok"):
            answer += connection.recv(4096)
    return requests / (time.perf_counter() - began)


def compare(name: str, rounds: int, requests: int) -> None:
    source, command = SERVERS[name]
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "served.py").write_text(source)
        servers, connections = [], []
        try:
            for target in ("served:app", "served:wrapped"):
                port = free_port()
                where = f"127.0.0.1:{port}" if command[-1] == "--listen" else str(port)
                servers.append(
                    subprocess.Popen(
                        [sys.executable, *command, where, target], cwd=directory,
                        env={**os.environ, "PAGE_PRIMER": "0"}, stderr=subprocess.DEVNULL,
                    )
                )  # fmt: skip
                connections.append(connect(port))
                rate(connections[-1], 200)
            pairs = []
            for turn in range(rounds):
                # In alternating order: what comes second finds a warmer processor.
                order = (0, 1) if turn % 2 else (1, 0)
                rates = {side: rate(connections[side], requests) for side in order}
                pairs.append((rates[0], rates[1]))
        finally:
            for server in servers:
                server.send_signal(signal.SIGTERM)
                server.wait(30)
    ratios = sorted(wrapped / plain for plain, wrapped in pairs)
    plain, wrapped = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"{name:16} {plain:10.0f} {wrapped:10.0f}   {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f}-{ratios[-1]:.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=2000)
    given = parser.parse_args()
    print(f"{'requests/s':16} {'without':>10} {'with':>10}   ratio (min-max)")
    for name in SERVERS:
        compare(name, given.rounds, given.requests)


if __name__ == "__main__":
    main()
