"""Serve the guest book primed, send it requests, and show what page-primer did: its lines in
gunicorn's log, and `page-primer status` of the running server."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
BASE = "http://127.0.0.1:8000"


def call(path: str, data: dict | None = None) -> object:
    body = json.dumps(data).encode() if data else None
    request = urllib.request.Request(BASE + path, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "gunicorn.log")
        command = [
            sys.executable, "-m", "gunicorn",
            "-c", "python:page_primer.integrations.gunicorn_conf",
            "--log-file", str(log), "app:app",
        ]  # fmt: skip
        print("$", "gunicorn", *command[3:], "\n", flush=True)
        server = subprocess.Popen(
            command, cwd=HERE, env={**os.environ, "GUESTBOOK_DB": str(Path(scratch, "db"))}
        )
        try:
            for _ in range(200):
                time.sleep(0.1)
                if server.poll() is not None:
                    break
                if log.exists() and "the guest book is open" in log.read_text():
                    break
            for number in range(200):
                call("/entries", {"name": f"guest {number}", "text": "was here"})
                entries = call("/entries")
            print(f"400 requests answered; the newest entry is {entries[0]}\n")
            print("$ page-primer status", server.pid, flush=True)
            subprocess.run([sys.executable, "-m", "page_primer", "status", str(server.pid)])
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(30)
            print(f"\n$ cat {log.name}")
            print(log.read_text() if log.exists() else "(no log)")
        print(f"gunicorn exited with status {status}")
        return status


if __name__ == "__main__":
    sys.exit(main())
