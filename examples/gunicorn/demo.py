"""Serve the guest book primed, send it requests, and show what page-primer did: its lines in
gunicorn's log, and `page-primer status` of the running server."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def call(url: str, data: dict | None = None) -> object:
    body = json.dumps(data).encode() if data else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except OSError as error:
        raise SystemExit(f"no answer from gunicorn: {error}") from None


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def show(server: subprocess.Popen, log: Path, url: str) -> None:
    """Wait for the server, send it requests, and look at it."""
    deadline = time.monotonic() + 30
    while not (log.exists() and "the guest book is open" in log.read_text()):
        if server.poll() is not None:
            raise SystemExit(f"gunicorn ended with status {server.returncode} before it served")
        if time.monotonic() > deadline:
            raise SystemExit("gunicorn did not serve within 30 seconds")
        time.sleep(0.1)
    for number in range(200):
        call(url, {"name": f"guest {number}", "text": "was here"})
        entries = call(url)
    print(f"400 requests answered; the newest entry is {entries[0]}\n")
    print("$ page-primer status", server.pid, flush=True)
    subprocess.run([sys.executable, "-m", "page_primer", "status", str(server.pid)], check=True)


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "gunicorn.log")
        url = f"http://127.0.0.1:{(port := free_port())}/entries"
        command = [
            sys.executable, "-m", "gunicorn",
            "-c", "python:page_primer.integrations.gunicorn_conf",
            "--bind", f"127.0.0.1:{port}", "--log-file", str(log), "app:app",
        ]  # fmt: skip
        print("$", "gunicorn", *command[3:], "\n", flush=True)
        server = subprocess.Popen(
            command, cwd=HERE, env={**os.environ, "GUESTBOOK_DB": str(Path(scratch, "db"))}
        )
        try:
            show(server, log, url)
        finally:  # The log, whatever came of it: it tells why.
            status = stop(server)
            print(f"\n$ cat {log.name}")
            print(log.read_text() if log.exists() else "(no log)", flush=True)
        print(f"gunicorn exited with status {status}")
        return status


if __name__ == "__main__":
    sys.exit(main())
