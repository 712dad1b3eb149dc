"""What locking buys when memory is short: the first request, or task, after a quiet spell.

    python benchmarks/pressure.py [--rounds N] [--celery] [--plot PREFIX] [--json FILE]

Needs root (memory cgroups of its own, version 1 or 2, removed afterwards), redis-server for
--celery, and vmtouch and perf (Debian's packages of these names, linux-perf) for what they add.

Each variant is a real gunicorn (or Celery worker) with one worker process, in a memory cgroup of
its own, on a copy of its own of the interpreter, its libraries and packages: a page belongs to the
cgroup that touched it first, and what somebody else keeps in memory would never be missed. In every
round, for each variant in an order that changes, a neighbour in the same cgroup streams through a
large file; then one request is timed: the first after a quiet spell. The neighbour's file is
sparse: it takes memory as any file does and leaves the disk to the worker, whose faults cost the
less for it. In as many further rounds there is no neighbour, and the variants answer requests in
turns.

Printed are medians, the 99th percentile and the maximum over all rounds; the median of major page
faults of the worker, by getrusage(2) and by /proc/PID/stat; how many of one more such request hit
ELF-backed memory, by perf; ratios to the unprimed worker, taken within each round; and of those
without pressure, by the clock and by the worker's own time on a processor (/proc/PID/schedstat),
the interval that the median lies in with a probability of 95 % (binomial, over the rounds).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kept

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.cgroup import Cgroup  # noqa: E402
from harness.pressure import environment, private_copy, stream_through  # noqa: E402
from harness.servers import NO_CONTROL_SOCKET, children, free_port, wait_for  # noqa: E402

MIB = 1 << 20
LIMIT = 144 * MIB
FILE = 320 * MIB  # what the neighbour streams through
QUIET = 60  # requests without pressure, a round
VARIANTS = {
    "unprimed": {"PAGE_PRIMER": "0"},
    "mlock only": {"PAGE_PRIMER_REMAP": "0"},
    "remap only": {"PAGE_PRIMER_MLOCK": "0"},
    "both": {},
    "vmtouch -l": {"PAGE_PRIMER": "0"},
}
APP = """
import json, os, re, resource, sqlite3, decimal, hashlib
from flask import Flask, request

app = Flask(__name__)
base = sqlite3.connect(":memory:", check_same_thread=False)
base.execute("create table item (name text, price integer)")
base.executemany("insert into item values (?, ?)", [(f"item {n}", n) for n in range(500)])

def work():
    rows = base.execute("select name, price from item where price % 7 = 0 order by name").fetchall()
    text = json.dumps({"rows": rows, "sum": str(sum(decimal.Decimal(p) / 3 for _, p in rows))})
    text = re.sub(r"item (\\d+)", lambda m: m[1].zfill(5), text)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {"pid": os.getpid(), "digest": hashlib.sha256(text.encode()).hexdigest(),
            "major": usage.ru_majflt}

@app.get("/")
def page():
    return work()
"""
TASKS = """
import os
from celery import Celery
from served import work

app = Celery("tasks", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(imports=["page_primer.integrations.celery"], worker_prefetch_multiplier=1,
                broker_connection_retry_on_startup=True)

@app.task
def do():
    return work()
"""


class Served:
    """A variant: its cgroup, its files, its server, and what was measured of it."""

    def __init__(self, name: str, work: Path, broker: str | None) -> None:
        self.name, self.broker = name, broker
        self.home = work / name.replace(" ", "-")
        private_copy(self.home, {"served.py": APP, "tasks.py": TASKS})
        self.stream = self.home / "stream"
        with open(self.stream, "wb") as file:
            file.truncate(FILE)
        self.cgroup = Cgroup(1 << 40)
        self.port = free_port()
        python = next((self.home / "bin").iterdir())
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PAGE_PRIMER", "PYTHON"))},
            **environment(self.home), "C_FORCE_ROOT": "1",
            "PAGE_PRIMER_IMAGE_DIR": str(self.home / "images"), **VARIANTS[name],
        }  # fmt: skip
        if broker:
            self.env["BROKER"] = f"{broker}/{list(VARIANTS).index(name)}"
            command = ["-m", "celery", "-A", "tasks", "worker", "-c", "1", "-l", "INFO",
                       "--without-gossip", "--without-mingle", "--without-heartbeat"]  # fmt: skip
        else:
            command = ["-m", "gunicorn", "-c", "python:page_primer.integrations.gunicorn_conf",
                       *NO_CONTROL_SOCKET, "--bind", f"127.0.0.1:{self.port}", "--timeout", "300",
                       "served:app"]  # fmt: skip
        self.output = open(self.home / "output", "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*self.cgroup.wrapper, str(python), *command], env=self.env, cwd=self.home / "site",
            stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output,
        )  # fmt: skip
        self.client: Any = None
        self.locker: subprocess.Popen[bytes] | None = None
        self.samples: list[dict[str, float]] = []
        self.elf: tuple[int, int] | None = None
        self.quiet: list[tuple[float, float]] = []  # milliseconds by the clock, and of work

    def start(self) -> None:
        if self.broker:
            from celery import Celery

            self.client = Celery("tasks", broker=self.env["BROKER"], backend=self.env["BROKER"])
        for _ in range(20):
            wait_for(self.request, f"{self.name} ({self.home}/output)", 60)
        self.worker = self.request()["pid"]
        if self.name == "vmtouch -l":
            files = sorted(elf_files(self.worker))
            # Its own memory is in the same cgroup, as a sidecar's would be.
            self.locker = subprocess.Popen([*self.cgroup.wrapper, "vmtouch", "-q", "-l", *files])
            wait_for(lambda: locked(self.locker.pid) > 0, "vmtouch")
        self.cgroup.limit = LIMIT

    def request(self) -> dict[str, Any]:
        if self.client is not None:
            answer: dict[str, Any] = self.client.send_task("tasks.do").get(timeout=120)
            return answer
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request("GET", "/")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()

    def press(self) -> None:
        stream_through(self.cgroup, self.stream)

    def round(self) -> None:
        """Pressure, and one request."""
        before = self.request()["major"]
        self.press()
        outside = major_faults(self.worker)
        began = time.perf_counter()
        answer = self.request()
        spent = (time.perf_counter() - began) * 1000
        self.samples.append({
            "ms": spent, "major": answer["major"] - before,
            "outside": major_faults(self.worker) - outside,
        })  # fmt: skip
        assert answer["pid"] == self.worker, "the worker is the same throughout"

    def quiet_round(self) -> None:
        """Requests without pressure."""
        for _ in range(3):
            self.request()
        spent = []
        worked = on_processor(self.worker)
        for _ in range(QUIET):
            began = time.perf_counter()
            self.request()
            spent.append((time.perf_counter() - began) * 1000)
        worked = on_processor(self.worker) - worked
        self.quiet.append((statistics.median(spent), worked / QUIET))

    def elf_faults(self) -> tuple[int, int] | None:
        """Major faults of one request after pressure: (all, in ELF-backed memory), by perf."""
        self.press()
        recording = self.home / "perf.data"
        perf = subprocess.Popen(
            ["perf", "record", "-q", "-e", "major-faults", "-c", "1", "-d", "-p", str(self.worker),
             "-o", str(recording)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(1)
        self.request()
        perf.send_signal(2)
        perf.wait()
        listed = subprocess.run(
            ["perf", "script", "-i", str(recording), "-F", "addr"], capture_output=True, text=True
        )
        addresses = [int(word, 16) for word in listed.stdout.split()]
        elf = [(low, high) for low, high in elf_ranges(self.worker)]
        return len(addresses), sum(any(a <= x < b for a, b in elf) for x in addresses)

    def stop(self) -> None:
        for process in (self.locker, self.process):
            if process is not None:
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                if process.poll() is None:
                    for child in children(process.pid):
                        os.kill(child, 9)
                    process.kill()
                    process.wait()
        self.output.close()
        self.cgroup.__exit__(None, None, None)


def major_faults(pid: int) -> int:
    """majflt of /proc/PID/stat, proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[9])


def on_processor(pid: int) -> float:
    """Milliseconds that a process of one thread has spent on a processor (Linux,
    Documentation/scheduler/sched-stats.rst)."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def locked(pid: int) -> int:
    found = re.search(r"VmLck:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) if found else 0


def mapped_files(pid: int) -> Iterator[tuple[int, int, str]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        row = line.split(maxsplit=5)
        if len(row) == 6 and row[5].startswith("/"):
            low, high = (int(part, 16) for part in row[0].split("-"))
            yield low, high, row[5]


def elf_ranges(pid: int) -> list[tuple[int, int]]:
    elf = elf_files(pid)
    return [(low, high) for low, high, path in mapped_files(pid) if path in elf]


def elf_files(pid: int) -> set[str]:
    found = set()
    for path in {path for _, _, path in mapped_files(pid)}:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if file.read(4) == b"\x7fELF":
                found.add(path)
    return found


@contextlib.contextmanager
def redis(work: Path) -> Iterator[str]:
    port = free_port()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir",
         str(work)], stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"redis://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def measure(rounds: int, work: Path, broker: str | None) -> list[Served]:
    names = [n for n in VARIANTS if n != "vmtouch -l" or shutil.which("vmtouch")]
    served: list[Served] = []
    try:
        for name in names:
            served.append(Served(name, work, broker))
            served[-1].start()
        for number in range(rounds + 2):
            for one in random.Random(number).sample(served, len(served)):
                one.round()
            if number < 2:  # settling
                for one in served:
                    one.samples.clear()
        for number in range(rounds):
            for one in random.Random(number).sample(served, len(served)):
                one.quiet_round()
        for one in served:
            one.elf = one.elf_faults() if shutil.which("perf") else None
    finally:
        for one in served:
            one.stop()
    return served


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and between which two of the values that of all such values lies, with a
    probability of 95 %: how many fall below it is a matter of tossing coins."""
    ordered = sorted(values)
    count = len(ordered)
    below, chance = 0, 0.5**count
    while below < count // 2 and chance <= 0.025:
        below += 1
        chance += math.comb(count, below) * 0.5**count
    low = max(0, below - 1)
    return statistics.median(ordered), ordered[low], ordered[count - 1 - low]


def summarise(served: list[Served], what: str) -> dict[str, Any]:
    base = served[0]
    print(f"\nthe first {what} after a quiet spell, {len(base.samples)} rounds, milliseconds")
    print(f"{'':12} {'p50':>7} {'p99':>7} {'max':>7}  ratio  faults  outside   in ELF"
          "   without pressure: p50, ratio, ratio of work")  # fmt: skip
    result = {}
    for one in served:
        ms = [s["ms"] for s in one.samples]
        pairs = zip(one.samples, base.samples, strict=True)
        ratio = statistics.median(mine["ms"] / theirs["ms"] for mine, theirs in pairs)
        both = list(zip(one.quiet, base.quiet, strict=True))
        quiet, work = (interval([mine[i] / theirs[i] for mine, theirs in both]) for i in (0, 1))
        faults = statistics.median(s["major"] for s in one.samples)
        outside = statistics.median(s["outside"] for s in one.samples)
        elf = "-" if one.elf is None else "{1} of {0}".format(*one.elf)
        print(f"{one.name:12} {statistics.median(ms):7.2f} {quantile(ms, 0.99):7.2f} {max(ms):7.2f}"
              f"  {ratio:5.2f} {faults:7g} {outside:8g} {elf:>8}"
              f"   {statistics.median(ms for ms, _ in one.quiet):5.2f}  "
              + "  ".join("{:.3f} ({:.3f} to {:.3f})".format(*of) for of in (quiet, work))
              )  # fmt: skip
        result[one.name] = {
            "ms": ms, "quiet_ms": one.quiet, "ratio": ratio, "quiet_ratio": quiet,
            "quiet_work_ratio": work,
            "major": [s["major"] for s in one.samples], "elf": one.elf,
            "outside": [s["outside"] for s in one.samples],
        }  # fmt: skip
    return result


def plot(results: dict[str, Any], prefix: str) -> None:
    """Every round a dot, the median a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, panes = pyplot.subplots(1, len(results), figsize=(5 * len(results), 3.4), squeeze=False)
    for pane, (what, variants) in zip(panes[0], results.items(), strict=True):
        for at, (_name, found) in enumerate(variants.items()):
            spread = random.Random(1)
            x = [at + spread.uniform(-0.18, 0.18) for _ in found["ms"]]
            pane.plot(x, found["ms"], ".", alpha=0.35, markersize=4, color="#3572A5")
            middle = statistics.median(found["ms"])
            pane.hlines(middle, at - 0.32, at + 0.32, color="#222222")
            pane.text(at + 0.36, middle, f"{middle:.1f}", ha="left", va="center", fontsize=9)
        pane.set_xticks(range(len(variants)), variants.keys(), fontsize=8)
        pane.set_xlim(-0.5, len(variants) - 0.2)
        pane.set_yscale("log")
        pane.set_ylim(bottom=1)
        pane.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        pane.yaxis.set_major_formatter("{x:g}")
        pane.yaxis.set_minor_locator(ticker.NullLocator())
        pane.set_ylabel("milliseconds")
        pane.set_title(f"first {what} after a quiet spell", fontsize=10)
        pane.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    for kind in ("png", "svg"):
        figure.savefig(
            f"{prefix}.{kind}", dpi=150, metadata={"Date": None} if kind == "svg" else {}
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--celery", action="store_true", help="Celery too, with a Redis")
    parser.add_argument("--plot", metavar="PREFIX", help="write PREFIX.png and PREFIX.svg")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample")
    given = parser.parse_args()
    if os.geteuid():
        sys.exit("needs root, to make memory cgroups")
    results: dict[str, Any] = {}
    measured = kept.commit()
    # Children of killed processes come to us, so that none is left behind.
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    for what in ("request", "task") if given.celery else ("request",):
        with tempfile.TemporaryDirectory(prefix="page-primer-", dir="/var/tmp") as work, \
                contextlib.ExitStack() as stack:  # fmt: skip
            broker = stack.enter_context(redis(Path(work))) if what == "task" else None
            results[what] = summarise(measure(given.rounds, Path(work), broker), what)
    if given.json:
        kept.write(given.json, measured, results)
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
