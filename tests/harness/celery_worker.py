"""A real Celery worker under test, with its log in a file."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from harness.servers import children, show_after, wait_for

TASKS = """
import os, sys, time
from celery import Celery

app = Celery("work", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
exec(os.environ.get("CONFIGURE", ""))

@app.task
def pid():
    return os.getpid()

@app.task
def add(a, b):
    return a + b

@app.task
def late():
    import numpy, pandas, pyarrow
    frame = pandas.DataFrame({"a": numpy.arange(1000.0)})
    return float(pyarrow.table(frame)["a"].to_numpy() @ numpy.ones(1000)), os.getpid()

@app.task
def nap(seconds):
    time.sleep(seconds)
    return os.getpid()
"""
BY_IMPORT = "app.conf.imports = ['page_primer.integrations.celery']\n"


class Worker:
    """A Celery worker, and a client that sends it tasks."""

    def __init__(
        self, directory, broker, images, *options, configure=BY_IMPORT, env=None, tasks=TASKS
    ):
        self.directory = Path(directory)
        (self.directory / "work.py").write_text(tasks)
        number = len(list(self.directory.iterdir()))
        self.env = {
            **os.environ, "BROKER": f"{broker}/{number % 16}", "CONFIGURE": configure,
            "PAGE_PRIMER_IMAGE_DIR": str(images), "C_FORCE_ROOT": "1", **(env or {}),
        }  # fmt: skip
        self.output = open(self.directory / "output", "wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "work", "worker", "-l", "DEBUG", *options],
            cwd=self.directory, env=self.env, stdin=subprocess.DEVNULL, stdout=self.output,
            stderr=self.output,
        )  # fmt: skip

    def __enter__(self):
        def ready():
            assert self.process.poll() is None, self.log()
            return " ready." in self.log()

        wait_for(ready, "the worker", 60)
        return self

    def __exit__(self, kind=None, *_):
        show_after(kind, self.log())
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        finally:
            if self.process.poll() is None:
                for pid in children(self.process.pid):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                self.process.kill()
            self.output.close()

    def log(self):
        return (self.directory / "output").read_text()

    def lines(self, level):
        pattern = rf"\[[^\]]*: {level}/[^\]]*\] (?:celery.worker.page_primer: )?page-primer: (.*)"
        return re.findall(pattern, self.log())

    def call(self, source, timeout=900):
        """Evaluate a Python expression in a client process, with the tasks' module as `work`."""
        code = f"import work, json; print(json.dumps({source}))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=self.directory, env=self.env, capture_output=True,
            text=True, timeout=timeout,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr + self.log()[-3000:]
        return json.loads(done.stdout)

    @property
    def pid(self):
        return self.process.pid

    @property
    def pool(self):
        return children(self.pid)


def spread(count):
    """An expression: tasks that run at the same time; the ids of the processes that ran them."""
    return f"sorted({{r.get(timeout=60) for r in [work.nap.delay(0.5) for _ in range({count})]}})"
