"""Processor time, throughput and memory of gunicorn, uvicorn and Celery, primed and not.

    python benchmarks/throughput.py [--minutes M] [--only SERVER] [--json DIR] [--variants LIST]

`page-primer bench` on each in turn, M minutes each: examples/gunicorn (Flask and SQLite) under
gunicorn with two workers, a small ASGI application under uvicorn, and a task of text and JSON under
a Celery worker with Redis. By its name alone `django` (two views, template and ORM) under gunicorn
with two workers a core, which take turns. Exit status 1 if a variant is slower than `off`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import kept
from applications import DJANGO

ROOT = Path(__file__).resolve().parent.parent
ASGI = """
import json
ROWS = [{"id": n, "name": f"guest {n}", "text": "was here"} for n in range(20)]

async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    body = json.dumps(ROWS).encode()
    await send({"type": "http.response.start", "status": 200,
                "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})
"""
TASK = """
import json, os, re
from celery import Celery
app = Celery("work", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
ROWS = [{"id": n, "name": f"guest {n}", "text": "was here"} for n in range(200)]

@app.task
def count():
    return len(re.findall(r"guest \\d+", json.dumps(ROWS)))
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def commands() -> dict[str, list[str]]:
    """What `page-primer bench` is given for each server."""
    url, address = "http://127.0.0.1:{port}", "127.0.0.1:{port}"
    python = [sys.executable, "-m"]
    return {
        "gunicorn": ["--url", f"{url}/entries", "--", *python, "gunicorn", "-w", "2", "-b", address,
                     "app:app"],
        # Answers in a tenth of the time.
        "uvicorn": ["--requests", "15000", "--url", f"{url}/", "--", *python, "uvicorn", "--port",
                    "{port}", "--log-level", "warning", "asgi:app"],
        "django": ["--url", f"{url}/", "--url", f"{url}/stored", "--", *python, "gunicorn", "-w",
                   str(2 * len(os.sched_getaffinity(0))), "-b", address, "djangoapp:application"],
        "celery": ["--requests", "1500", "--celery-task", "work.count", "--", *python, "celery",
                   "-A", "work", "worker", "-c", "2", "-Q", "{queue}", "-n", "{queue}"],
    }  # fmt: skip


def judge(server: str, result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The variants that are slower than `off`, and those that too few rounds were for."""
    slower, unknown = [], []
    for variant, found in result["variants"].items():
        verdict = found.get("verdict", "")
        if verdict.startswith("slower"):
            slower.append(f"{server}, {variant}")
        elif verdict.startswith(("no verdict", "no measurement")):
            unknown.append(f"{server}, {variant}")
    return slower, unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=3.0, help="for each server")
    parser.add_argument("--only", choices=("gunicorn", "uvicorn", "celery", "django"))
    parser.add_argument("--variants", default="off,off-again,code,code+heap")
    parser.add_argument("--json", type=Path, metavar="DIR", help="a file for each server")
    given = parser.parse_args()
    measured = kept.commit()
    slower: list[str] = []
    unknown: list[str] = []
    with tempfile.TemporaryDirectory(prefix="throughput-", dir="/var/tmp") as name:
        directory = Path(name)
        shutil.copy(ROOT / "examples" / "gunicorn" / "app.py", directory)
        (directory / "asgi.py").write_text(ASGI)
        (directory / "work.py").write_text(TASK)
        redis, broker = free_port(), None
        environ = {
            **os.environ, "PAGE_PRIMER_IMAGE_DIR": str(directory / "images"),
            "BROKER": f"redis://127.0.0.1:{redis}/0", "C_FORCE_ROOT": "1",
            "GUESTBOOK_DB": str(directory / "db"),
        }  # fmt: skip
        for server, words in commands().items():
            if given.only != server and (given.only or server == "django"):
                continue
            print(f"\n{server}", flush=True)
            if server == "django":
                (directory / "djangoapp.py").write_text(DJANGO)
                subprocess.run([sys.executable, "djangoapp.py"], cwd=directory, check=True)
            if server == "celery":
                if not shutil.which("redis-server"):
                    print("left out: no redis-server")
                    continue
                broker = subprocess.Popen(
                    ["redis-server", "--port", str(redis), "--save", "", "--bind", "127.0.0.1"],
                    cwd=directory, stdout=subprocess.DEVNULL,
                )  # fmt: skip
            found = directory / f"{server}.json"
            at = words.index("--")
            options = ["--minutes", str(given.minutes), "--variants", given.variants]
            try:
                subprocess.run(
                    [sys.executable, "-m", "page_primer", "bench", *words[:at], *options,
                     "--json", str(found), *words[at:]],
                    cwd=directory, env=environ, check=True,
                )  # fmt: skip
            finally:
                if broker:
                    broker.terminate()
                    broker.wait()
            result = json.loads(found.read_text())
            its_slower, its_unknown = judge(server, result)
            slower += its_slower
            unknown += its_unknown
            if given.json:
                result["server"] = words[at + 1 :]
                kept.write(given.json / f"throughput-{server}.json", measured, result)
    print(f"\nslower: {'; '.join(slower)}" if slower else "\nno variant is slower")
    if unknown:
        print(f"too few rounds to tell: {'; '.join(unknown)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
