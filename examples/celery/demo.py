"""Run the worker with a Redis of its own, send it tasks, and show what page-primer did: its lines
in the worker's log, and `page-primer status` of the running worker."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wait_for(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise SystemExit(f"{what} did not start")


def main() -> int:
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server is not installed")
    port = free_port()
    os.environ["BROKER"] = f"redis://127.0.0.1:{port}/0"
    os.environ.setdefault("C_FORCE_ROOT", "1")
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch, "worker.log")
        redis = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""],
            cwd=scratch, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        command = [sys.executable, "-m", "celery", "-A", "work", "worker", "-c", "2", "-l", "INFO"]
        print("$", "celery", *command[3:], "\n", flush=True)
        with open(log, "wb") as output:
            worker = subprocess.Popen(command, cwd=HERE, stdout=output, stderr=output)
        try:
            wait_for(lambda: " ready." in log.read_text(), "the worker")
            sys.path.insert(0, str(HERE))
            from work import summary

            results = [summary.delay(seed, 1000) for seed in range(20)]
            print(f"20 tasks done; the last one's result is {[r.get(60) for r in results][-1]}\n")
            print("$ page-primer status", worker.pid, flush=True)
            subprocess.run([sys.executable, "-m", "page_primer", "status", str(worker.pid)])
        finally:
            worker.send_signal(signal.SIGTERM)
            status = worker.wait(30)
            redis.terminate()
            redis.wait(30)
            print(f"\n$ grep page-primer {log.name}")
            lines = log.read_text().splitlines()
            print("\n".join(line for line in lines if "page-primer" in line))
        print(f"the worker exited with status {status}")
        return status


if __name__ == "__main__":
    sys.exit(main())
