"""Serve the guest book as it is, and then primed; show what differs in the kernel's smaps, and, of
the primed one, `page-primer status` and its log."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
HUGE = "AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", "Private_Hugetlb", "Shared_Hugetlb"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def call(url: str, data: dict | None = None) -> object:
    body = json.dumps(data).encode() if data else None
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except OSError as error:
        raise SystemExit(f"no answer from gunicorn: {error}") from None


class Guestbook:
    """gunicorn with the guest book: the README's command, on a port of its own."""

    def __init__(self, scratch: Path, name: str, **environ: str) -> None:
        self.name, self.log = name, scratch / f"{name}.log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}/entries"
        self.command = [
            sys.executable, "-m", "gunicorn",
            "-c", "python:page_primer.integrations.gunicorn_conf",
            "--bind", f"127.0.0.1:{port}", "--log-file", str(self.log), "app:app",
        ]  # fmt: skip
        shown = [f"{key}={value}" for key, value in environ.items()]
        print("$", *shown, "gunicorn", *self.command[3:], flush=True)
        environ["GUESTBOOK_DB"] = str(scratch / f"{name}.db")
        self.process = subprocess.Popen(self.command, cwd=HERE, env={**os.environ, **environ})

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while not (self.log.exists() and "the guest book is open" in self.log.read_text()):
            if self.process.poll() is not None:
                raise SystemExit(
                    f"gunicorn ended with status {self.process.returncode} before it served"
                )
            if time.monotonic() > deadline:
                raise SystemExit("gunicorn did not serve within two minutes")
            time.sleep(0.1)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def workers(self) -> list[int]:
        """By the parent that each process names, since some kernels list no children."""
        found = []
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):  # it has ended
                (parent,) = re.findall(r"^PPid:\s+(\d+)$", status.read_text(), re.MULTILINE)
                if int(parent) == self.process.pid:
                    found.append(int(status.parent.name))
        return found

    def figures(self) -> list[str]:
        """What smaps has of its workers, on average."""
        seen = []
        for pid in self.workers():
            with suppress(OSError):
                seen.append(look(pid))
        if not seen:
            raise SystemExit(f"gunicorn has no workers; see {self.log}")
        code, huge, locked, pss = (sum(one) / len(seen) / 1024 for one in zip(*seen, strict=True))
        return [f"{huge:.1f} of {code:.1f} MiB", f"{locked:.1f} MiB", f"{pss:.1f} MiB"]


def look(pid: int) -> tuple[int, int, int, int]:
    """KiB of a process's executable mappings, of these on huge pages, locked, and its share of all
    memory (Pss)."""
    code = huge = pss = 0
    executable = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if header := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) ", line):
            executable = "x" in header[1]
            continue
        name, _, value = line.partition(":")
        size = int(value.split()[0]) if value.endswith(" kB") else 0
        pss += size * (name == "Pss")
        code += size * (name == "Size" and executable)
        is_huge = name in HUGE
        huge += size * (is_huge and executable)
    status = Path(f"/proc/{pid}/status").read_text()
    (locked,) = re.findall(r"^VmLck:\s+(\d+) kB$", status, re.MULTILINE)
    return code, huge, int(locked), pss


def ask(url: str) -> str:
    """200 entries, and the page after each; the newest."""
    entries: object = []
    for number in range(200):
        call(url, {"name": f"guest {number}", "text": "was here"})
        entries = call(url)
    assert isinstance(entries, list)
    return f"400 requests answered; the newest entry is {entries[0]}"


def serve(server: Guestbook) -> list[str]:
    """Send it requests, and look at it."""
    server.wait()
    print(f"{ask(server.url)}\n", flush=True)
    return server.figures()


def compare(plain: list[str], primed: list[str]) -> None:
    titles = ("executable memory on huge pages", "locked", "memory of a worker (PSS)")
    print(f"  {'a worker, by its smaps':33}{'unprimed':>18}{'primed':>18}")
    for title, one, other in zip(titles, plain, primed, strict=True):
        print(f"  {title:33}{one:>18}{other:>18}")
    print("\nWhether it is faster on this machine: page-primer bench (docs/bench.md)\n")


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        server = Guestbook(Path(scratch), "unprimed", PAGE_PRIMER="0")
        try:
            plain = serve(server)
        finally:
            server.stop()
        server = Guestbook(Path(scratch), "primed")
        try:
            compare(plain, serve(server))
            print("$ page-primer status", server.process.pid, flush=True)
            status = [sys.executable, "-m", "page_primer", "status", str(server.process.pid)]
            subprocess.run(status, check=True)
        finally:  # The log, whatever came of it: it tells why.
            ended = server.stop()
            print(f"\n$ cat {server.log.name}")
            print(server.log.read_text() if server.log.exists() else "(no log)", flush=True)
        print(f"gunicorn exited with status {ended}")
        return ended


if __name__ == "__main__":
    sys.exit(main())
