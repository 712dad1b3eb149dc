"""What locking buys when memory is short: the first request, or task, after a quiet spell.

    python benchmarks/pressure.py [--rounds N] [--celery] [--plot PREFIX] [--json FILE]
        [--variants NAME,NAME] [--mglru on|off|both] [--guest KERNEL]

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

With --mglru the kernel's multi-generational LRU is switched on or off meanwhile, and restored; with
`both` each round has both, in an order that changes, and behind each switch every variant has a
pressure and a request that do not count. Without it the setting is left alone. --guest measures in
a guest with another kernel, booted in qemu (tests/harness/guest.py), without --celery; --untimed
leaves out what a clock says, and the requests without pressure, as is done in a guest.

Printed are medians, the 99th percentile and the maximum over all rounds; the median, least and most
of major page faults of the worker, by getrusage(2), and the median by /proc/PID/stat; how many of
one more such request hit ELF-backed memory, by perf; what of the interpreter's code was in the
worker's memory between the pressure and the request, by smaps; ratios to the unprimed worker, taken
within each round; and of those without pressure, by the clock and by the worker's own time on a
processor (/proc/PID/schedstat), the interval that the median lies in with a probability of 95 %
(binomial, over the rounds).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guests
import kept
import mglru
from pressure_tables import Found, plot, summarise

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness.cgroup import Cgroup  # noqa: E402
from harness.outside import text_of  # noqa: E402
from harness.pressure import environment, private_copy, stream_through  # noqa: E402
from harness.recording import recording  # noqa: E402
from harness.servers import NO_CONTROL_SOCKET, children, free_port, wait_for  # noqa: E402

MIB = 1 << 20
LIMIT = 144 * MIB
FILE = 320 * MIB  # what the neighbour streams through
QUIET = 60  # requests without pressure, a round
SETTLING = 2  # rounds at first that do not count, where each switch has not its own
START = 600  # seconds that a server may take, in an emulated machine
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

    def start(self) -> None:
        if self.broker:
            from celery import Celery

            self.client = Celery("tasks", broker=self.env["BROKER"], backend=self.env["BROKER"])
        for _ in range(20):
            wait_for(self.request, f"{self.name} ({self.home}/output)", START)
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

    def round(self) -> dict[str, float]:
        """Pressure, and one request."""
        before = self.request()["major"]
        self.press()
        resident, code = interpreter_code(self.worker)
        outside = major_faults(self.worker)
        began = time.perf_counter()
        answer = self.request()
        spent = (time.perf_counter() - began) * 1000
        assert answer["pid"] == self.worker, "the worker is the same throughout"
        return {
            "ms": spent, "major": answer["major"] - before,
            "outside": major_faults(self.worker) - outside, "resident": resident, "code": code,
        }  # fmt: skip

    def quiet_round(self) -> tuple[float, float]:
        """Requests without pressure: milliseconds of one, by the clock and of work."""
        for _ in range(3):
            self.request()
        spent = []
        worked = on_processor(self.worker)
        for _ in range(QUIET):
            began = time.perf_counter()
            self.request()
            spent.append((time.perf_counter() - began) * 1000)
        worked = on_processor(self.worker) - worked
        return statistics.median(spent), worked / QUIET

    def elf_faults(self) -> tuple[int, int] | None:
        """Major faults of one request after pressure: (all, in ELF-backed memory), by perf."""
        self.press()
        data = str(self.home / "perf.data")
        options = ["-e", "major-faults", "-c", "1", "-d", "-p", str(self.worker), "-o", data]
        with recording("perf", *options) as perf:
            if not perf.running:
                return None
            self.request()
        listed = subprocess.run(
            ["perf", "script", "-i", data, "-F", "addr"], capture_output=True, text=True
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


def interpreter_code(pid: int) -> tuple[int, int]:
    """Bytes of the interpreter's code that the process has in memory, and all that there are."""
    code = [vma for vma in text_of(pid).span_vmas if "x" in vma.perms]
    return sum(vma.kb["Rss"] for vma in code) << 10, sum(vma.end - vma.start for vma in code)


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


def settle(served: list[Served]) -> None:
    """A round that does not count: pages are in the order that the mode before has left."""
    for one in served:
        one.round()


def measure(
    work: Path, broker: str | None, given: argparse.Namespace, switch: Callable[[str], None]
) -> dict[str, list[Found]]:
    """Start all variants and measure them, in each mode of MGLRU that is asked for."""
    names = [n for n in given.variants if n != "vmtouch -l" or shutil.which("vmtouch")]
    modes = mglru.MODES[given.mglru]
    found = {mode: {name: Found(name) for name in names} for mode in modes}
    served: list[Served] = []
    try:
        for name in names:
            served.append(Served(name, work, broker))
            served[-1].start()
        settling = 0 if given.mglru else SETTLING
        for number in range(given.rounds + settling):
            order = random.Random(number)
            for mode in order.sample(modes, len(modes)):
                switch(mode)
                settle(served if mode else [])
                for one in order.sample(served, len(served)):
                    sample = one.round()
                    if number >= settling:
                        found[mode][one.name].samples.append(sample)
        for mode in modes:
            switch(mode)
            settle(served if mode else [])
            for number in range(0 if given.untimed else given.rounds):
                for one in random.Random(number).sample(served, len(served)):
                    found[mode][one.name].quiet.append(one.quiet_round())
            for one in served:
                found[mode][one.name].elf = one.elf_faults() if shutil.which("perf") else None
    finally:
        for one in served:
            one.stop()
    return {mode: list(variants.values()) for mode, variants in found.items()}


def in_this_machine(given: argparse.Namespace) -> dict[str, Any]:
    """Measure, print tables and return what is kept, by the tables' titles."""
    results: dict[str, Any] = {}
    with mglru.switch(given.mglru) as switch:
        # Children of killed processes come to us, so that none is left behind.
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        for what in ("request", "task") if given.celery else ("request",):
            with tempfile.TemporaryDirectory(prefix="page-primer-", dir=given.work) as work, \
                    contextlib.ExitStack() as stack:  # fmt: skip
                broker = stack.enter_context(redis(Path(work))) if what == "task" else None
                for mode, found in measure(Path(work), broker, given, switch).items():
                    title = f"{what}, MGLRU {mode}" if mode else what
                    results[title] = summarise(found, title, timed=not given.untimed)
    return results


def in_a_guest(given: argparse.Namespace) -> dict[str, Any]:
    """The same under another kernel, which may be emulated: no clock is read."""
    arguments = ["--untimed", "--work", guests.SCRATCH, "--rounds", str(given.rounds)]
    arguments += ["--variants", ",".join(given.variants)]
    asked = ["--mglru", given.mglru] if given.mglru else []
    return guests.run(given.guest, Path(__file__).name, [*arguments, *asked])


def variants(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in VARIANTS:
            raise argparse.ArgumentTypeError(f"no variant is named {name!r}")
    return names


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=60)
    add("--celery", action="store_true", help="Celery too, with a Redis")
    add("--plot", metavar="PREFIX", help="write PREFIX.png and PREFIX.svg")
    add("--json", type=Path, metavar="FILE", help="write every sample")
    add("--variants", type=variants, default=[*VARIANTS], metavar="NAME,NAME",
        help=f"of {', '.join(VARIANTS)}; ratios are to the first")  # fmt: skip
    add("--mglru", choices=[mode for mode in mglru.MODES if mode],
        help="with the multi-generational LRU on, off, or both in turns; restored")  # fmt: skip
    add("--untimed", action="store_true", help="only what needs no clock")
    add("--guest", metavar="KERNEL", help="under this kernel, in qemu, --untimed")
    add("--work", default="/var/tmp", metavar="DIR", help="on a disk (default: %(default)s)")
    given = parser.parse_args()
    if given.rounds < 1:
        parser.error("--rounds must be at least 1")
    if given.plot and (given.untimed or given.guest):
        parser.error("--plot is of times: not with --untimed or --guest")
    if given.guest and given.celery:
        parser.error("--celery is not for --guest")
    return given


def main() -> None:
    given = options()
    if os.geteuid() and not given.guest:
        sys.exit("needs root, to make memory cgroups")
    measured = kept.commit()
    try:
        results = in_a_guest(given) if given.guest else in_this_machine(given)
    except (mglru.Unavailable, guests.Failed) as why:
        sys.exit(str(why))
    if given.json:
        kept.write(given.json, measured, results)
    if given.plot:
        plot(results, given.plot)


if __name__ == "__main__":
    main()
