"""Run the worker with a Redis of its own, send it tasks, and show what page-primer did: its lines
in the worker's log, and `page-primer status` of the running worker."""

import contextlib
import os
import re
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


class Failed(Exception):
    """A process ended or said an error; the message is what it said."""


def answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition, what: str, process: subprocess.Popen, log: Path) -> None:
    """Wait until a condition holds, unless the process ends or logs an error before."""
    deadline = time.monotonic() + 60
    while not condition():
        text = log.read_text()
        if process.poll() is not None:
            raise Failed(f"{what}: ended with status {process.returncode}; its log:\n{text}")
        if re.search(r": (ERROR|CRITICAL)/", text) or time.monotonic() > deadline:
            raise Failed(f"{what}: not within a minute, or an error; its log:\n{text}")
        time.sleep(0.1)


def stop(process: subprocess.Popen) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def show(worker: subprocess.Popen, log: Path) -> None:
    """Give the worker twenty tasks, and look at it."""
    wait_for(lambda: " ready." in log.read_text(), "the worker", worker, log)
    sys.path.insert(0, str(HERE))
    from work import summary

    results = [summary.delay(seed, 1000) for seed in range(20)]
    wait_for(lambda: all(r.ready() for r in results), "the tasks", worker, log)
    print(f"20 tasks done; the last one's result is {results[-1].get()}\n")
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children").read_text().split()
    with_pandas = next(pid for pid in children if "pandas" in Path(f"/proc/{pid}/maps").read_text())
    for pid in (str(worker.pid), with_pandas):
        print("$ page-primer status", pid, flush=True)
        subprocess.run([sys.executable, "-m", "page_primer", "status", pid], check=True)


def main() -> int:
    if shutil.which("redis-server") is None:
        raise SystemExit("redis-server is not installed")
    port = free_port()
    os.environ["BROKER"] = f"redis://127.0.0.1:{port}/0"
    os.environ.setdefault("C_FORCE_ROOT", "1")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        log, redis_log = Path(scratch, "worker.log"), Path(scratch, "redis.log")
        command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        with open(redis_log, "wb") as output:
            redis = subprocess.Popen(command, cwd=scratch, stdout=output, stderr=output)
        stack.callback(stop, redis)
        command = [sys.executable, "-m", "celery", "-A", "work", "worker", "-c", "2", "-l", "INFO"]
        try:
            wait_for(lambda: answers(port), "Redis", redis, redis_log)
            print("$", "celery", *command[3:], "\n", flush=True)
            with open(log, "wb") as output:
                worker = subprocess.Popen(command, cwd=HERE, stdout=output, stderr=output)
            stack.callback(stop, worker)
            show(worker, log)
        except Failed as error:
            raise SystemExit(str(error)) from None
        status = stop(worker)
        print(f"\n$ grep page-primer {log.name}")
        lines = log.read_text().splitlines()
        print("\n".join(line for line in lines if "page-primer: " in line))
        print(f"the worker exited with status {status}")
        return status


if __name__ == "__main__":
    sys.exit(main())
