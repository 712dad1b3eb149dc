"""Processor time of a script with its code and its heap on small and on huge pages.

    python benchmarks/processor_time.py [--python P] [--rounds N] [--processes N] [--lanes N]
                                        [--json FILE]

Several processes take turns on one core (as more workers than cores do) and each measures its own
processor time for a fixed amount of work, after a warm-up. A round runs every variant once, in
random order; what counts are the ratios to the plain interpreter within a round: their median, and
a 95 % interval by bootstrap over rounds. The plain interpreter runs twice: that ratio shows the
noise. Beside them the share of .text on huge pages as smaps shows it, and a pointer chase that
tells whether huge pages of this machine are huge to its processor (tlb_probe.c).

Lanes run the same on cores of their own at the same time: more rounds an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What prime() is called with in each variant; None: not at all. "aligned" needs no call.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "plain again": None,
    "image": {"heap": False},
    "aligned": None,
    "heap": {"remap": False, "heap": "all"},
    "image + heap": {"heap": "all"},
}

# What a web application's request consists of, without a framework: parsing, matching, templates,
# a database, sorting, arithmetic.
WORK = r"""
import json, re, sqlite3, string, sys, time, decimal, collections, hashlib
options = json.loads(sys.argv[1])
def prime():
    if options is not None:
        import page_primer
        page_primer.prime(mlock=False, image_dir=sys.argv[3], **options)
prime()
rows = [{"id": i, "name": f"user {i}", "tags": ["a", "b", str(i)], "score": i * 1.5}
        for i in range(60)]
table = sqlite3.connect(":memory:")
table.execute("create table users (id integer primary key, name text, score real)")
table.executemany("insert into users values (:id, :name, :score)", rows)
template = string.Template("<li class='$cls'>$name: $score</li>")
word = re.compile(r"(\w+)\s+(\d+)")
class User:
    def __init__(self, id, name, tags, score):
        self.id, self.name, self.tags, self.score = id, name, tags, score
    def __lt__(self, other):
        return (self.score, self.name) < (other.score, other.name)
cache = {i: User(i, f"cached {i}", [], i * 0.5) for i in range(int(sys.argv[4]))}
prime()  # as integrations do once an application is loaded
def request(n):
    seen = sum(cache[(n * 7919 + k * 104729) % len(cache)].score for k in range(200))
    users = sorted(User(**row) for row in json.loads(json.dumps(rows)))
    page = "".join(template.substitute(cls="odd" if u.id % 2 else "even", name=u.name,
                                       score=u.score)
                   for u in users)
    found = collections.Counter(m[1] for m in word.finditer(page))
    got = table.execute("select name, sum(score) from users where id % ? = 0 group by name",
                        (n % 7 + 2,)).fetchall()
    total = sum(decimal.Decimal(str(score)) for _, score in got)
    return hashlib.sha256(f"{page}{found}{total}{seen}".encode()).hexdigest()
loops = int(sys.argv[2])
for n in range(loops // 4):
    request(n)
began = time.process_time()
for n in range(loops):
    request(n)
took = time.process_time() - began
text = open("/proc/self/smaps").read()
print(json.dumps([took, text]))
"""


@dataclass(frozen=True)
class Interpreter:
    """An interpreter and the copy of it that is aligned."""

    program: str
    environment: dict[str, str]
    code: str  # the file with the interpreter's code


def interpreter_in(directory: Path, python: str, *, aligned: bool) -> Interpreter:
    """A copy of an interpreter's code; where a libpython has it, the program loads the copy."""
    ask = (
        "import json, re, sys\n"
        "maps = open('/proc/self/maps').read()\n"
        "found = re.search(r'(/\\S*/libpython3[^/\\s]*\\.so\\S*)', maps)\n"
        "print(json.dumps([sys._base_executable, sys.base_prefix, found and found[1]]))"
    )
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    program, prefix, library = json.loads(asked.stdout)
    program = os.path.realpath(program)
    place = directory if library else directory / "bin"
    place.mkdir(parents=True)
    copy = place / os.path.basename(library or program)
    shutil.copy(library or program, copy)
    if not library:  # which finds its library beside bin/
        (directory / "lib").symlink_to(Path(prefix) / "lib")
    if aligned:
        target = [str(copy)] if library else ["--python", str(copy)]
        subprocess.run(
            [sys.executable, "-m", "page_primer", "align", *target],
            check=True, env={**os.environ, "PAGE_PRIMER_ALIGNED": str(directory / "list")},
        )  # fmt: skip
    environment = {"PYTHONPATH": str(ROOT)}
    if library:
        environment["LD_LIBRARY_PATH"] = str(directory)
    return Interpreter(program if library else str(copy), environment, str(copy))


def huge_shares(smaps: str, name: str) -> tuple[float, float]:
    """The share of a file's executable mappings that is on huge pages, and that of what is resident
    of anonymous memory."""
    size = huge = 0
    resident = sum(map(int, re.findall(r"^Anonymous:\s+(\d+)", smaps, re.MULTILINE)))
    anonymous = sum(map(int, re.findall(r"^AnonHugePages:\s+(\d+)", smaps, re.MULTILINE)))
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        line = block.splitlines()[0]
        if line.split()[1][2] == "x" and line.rstrip().endswith("/" + name):
            counters = dict(re.findall(r"^(\w+):\s+(\d+) kB$", block, re.MULTILINE))
            size += int(counters["Size"])
            huge += int(counters["FilePmdMapped"])
    return huge / size if size else 0.0, anonymous / max(resident, 1)


def measure(
    variant: str, use: Interpreter, core: int, options: Any, images: str
) -> tuple[float, tuple[float, float]]:
    """Processor time of all processes of one variant, seconds, and the huge shares of the last."""
    call = json.dumps(VARIANTS[variant])
    command = [use.program, "-c", WORK, call, str(options.loops), images, str(options.cache)]
    keep = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**keep, **use.environment},
            preexec_fn=lambda: os.sched_setaffinity(0, [core]),
        )
        for _ in range(options.processes)
    ]  # fmt: skip
    total, smaps = 0.0, ""
    for process in started:
        out, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{variant}: exit status {process.returncode}")
        took, smaps = json.loads(out)
        total += took
    return total, huge_shares(smaps, os.path.basename(use.code))


def interval(ratios: list[float], draws: int = 4000) -> tuple[float, float]:
    """A 95 % interval of the median, by bootstrap."""
    generator = random.Random(1)
    medians = sorted(
        statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws)
    )
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def probe(directory: Path) -> list[list[float]]:
    """Pages, nanoseconds an access over small and over huge pages."""
    program = directory / "tlb_probe"
    source = ROOT / "benchmarks" / "tlb_probe.c"
    try:
        subprocess.run(["gcc", "-O2", "-o", program, source], check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return [[float(word) for word in line.split()] for line in out.splitlines()]


def main() -> None:  # Longer: one experiment and its table, read from top to bottom
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=4, help="on one core, taking turns")
    parser.add_argument("--lanes", type=int, default=1)
    parser.add_argument("--loops", type=int, default=400)
    parser.add_argument("--cache", type=int, default=100_000,
                        help="objects that live on, of which a request looks at 200")  # fmt: skip
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="page-primer-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        chased = probe(directory)
        plain = interpreter_in(directory / "plain", options.python, aligned=False)
        aligned = interpreter_in(directory / "aligned", options.python, aligned=True)
        cores = sorted(os.sched_getaffinity(0))[:: max(1, os.cpu_count() // options.lanes or 1)]
        seen: dict[str, tuple[float, float]] = {}

        def lane(number: int) -> list[dict[str, float]]:
            rounds = []
            generator = random.Random(number)
            for _ in range(options.rounds):
                order = list(VARIANTS)
                generator.shuffle(order)
                took = {}
                for variant in order:
                    use = aligned if variant == "aligned" else plain
                    images = str(directory / "images")
                    took[variant], seen[variant] = measure(
                        variant, use, cores[number % len(cores)], options, images
                    )
                rounds.append(took)
            return rounds

        with ThreadPoolExecutor(options.lanes) as pool:
            lanes = pool.map(lane, range(options.lanes))
            rounds = [took for lane_rounds in lanes for took in lane_rounds]
    result: dict[str, Any] = {
        "machine": platform.platform(),
        "processor": (
            re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
            or [platform.machine()]
        )[0],
        "cores": os.cpu_count(),
        "python": platform.python_version() if options.python == sys.executable else options.python,
        "options": {
            name: value for name, value in vars(options).items() if name not in ("json", "python")
        },
        "processes": options.processes,
        "rounds": len(rounds),
        "tlb_probe": chased,
        "variants": {},
    }
    print(f"{result['processor']}, {len(rounds)} rounds of {options.processes} processes on a core")
    for pages, small, huge in chased:
        print(f"pointer chase, {pages:6.0f} pages: {small:6.2f} ns small, {huge:6.2f} ns huge, "
              f"ratio {small / huge:.2f}")  # fmt: skip
    for variant in list(VARIANTS)[1:]:
        ratios = [took[variant] / took["plain"] for took in rounds]
        low, high = interval(ratios)
        result["variants"][variant] = {
            "ratio": statistics.median(ratios), "low": low, "high": high, "ratios": ratios,
            "code_huge": seen[variant][0], "anonymous_huge": seen[variant][1],
        }  # fmt: skip
        code, anonymous = seen[variant]
        print(f"{variant:12} {statistics.median(ratios):.3f} of plain's processor time "
              f"(95 %: {low:.3f} to {high:.3f}); huge: {100 * code:.0f} % of the executable "
              f"mapping, {100 * anonymous:.0f} % of anonymous memory")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
