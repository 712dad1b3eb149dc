"""Page walks of a workload, by trace: on 4 KiB pages, by rules, and with what each variant obtains.

    python benchmarks/page_walks.py [--work flask|django|dataframe|sklearn] [--python P]
                                    [--loops N] [--json FILE] [--shares ARENAS,HEAP ...]

Needs no hardware counters. The workload runs natively, for its address space; under QEMU with
tlb/pagetrace.c, which records the sequence of pages that instructions are fetched from and data
is accessed in; and natively again as each variant of `page-primer bench`, of which smaps says what
is on huge pages. tlb/tlbsim.c replays the trace through the TLBs of some cores, once with each
set of huge pages. What is printed are page walks of code and data together, for one process and for
four that take turns on a core, as ratios to those on 4 KiB pages; and by the place of the page, for
four on the first core (the JSON has the others).

Pages of files are told by their place in the object; anonymous memory by its kind (arenas, brk
heap, other), of which the share counts that the variant has on huge pages at the end of the last
iteration; with --shares so much of arenas and [heap], in per cent, as benchmarks/heap.py finds it
in a server's worker. Only user code counts; true LRU, no prefetch, no wrong-path fetch; QEMU has
AVX2, not AVX-512. Packages that a workload needs and the Python does not have are installed into a
virtual environment that lasts as long as this does.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kept

from page_primer.bench import interpreter, variants

from tlb.cores import CORES, Core, simulate  # isort: skip
from tlb.layout import HUGE, Snapshot, per_segment, spans, spread  # isort: skip
from tlb.works import WORKS, python_for, script, versions  # isort: skip

HERE = Path(__file__).resolve().parent
# All of it: variables take memory, and move everything that is allocated after them.
ENVIRONMENT = {"PATH": os.defpath, "HOME": "/", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"}
SIZE_4K, SIZE_2M = 0, 2
SCENARIOS = {"1": (1, 1), "4": (4, 1_000_000)}  # processes, instructions a turn
KINDS = ("arena", "brk", "other")  # anonymous memory but stacks
VARIANTS = "off,code,code+heap,aligned,aligned-heap:heap=all"


@dataclass(frozen=True)
class Page:
    """A page of the trace: of a file, or anonymous (`kind`), by the traced process's address."""

    address: int
    name: str = ""
    offset: int = 0
    code: bool = False
    kind: str | None = None


class Trace:
    """What the workload touched, page by page, between its marks."""

    def __init__(self, directory: Path, simulator: ctypes.CDLL) -> None:
        with open(directory / "trace", "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.records = (ctypes.c_uint32 * (len(memory) // 4)).from_buffer(memory)
        numbers = [int(line, 16) for line in (directory / "trace.pages").read_text().split()]
        self.visits, self.instructions = ((ctypes.c_uint64 * len(numbers))() for _ in range(2))
        simulator.histogram(
            self.records, ctypes.c_size_t(len(self.records)), self.visits, self.instructions
        )
        self.space = Snapshot.read(directory / "traced.maps")
        self.kinds = self.space.kinds()
        self.pages = [
            self._page(number << 12, bool(visits))
            for number, visits in zip(numbers, self.visits, strict=True)
        ]

    def _page(self, address: int, code: bool) -> Page:
        area = self.space.area_of(address)
        if area and area.path.startswith("/"):
            name = os.path.basename(area.path)
            return Page(address, name, area.offset + address - area.start, code)
        kind = next((kind for at, kind in self.kinds if at.start <= address < at.end), None)
        return Page(address, kind=kind, code=code)

    def places(self, native: Snapshot, spans: set[int]) -> list[str]:
        """Of each page what it is: code in a span, which can be huge, or elsewhere; constants and
        variables of objects; or its kind of anonymous memory."""
        found = []
        for page in self.pages:
            at = native.find(page.name, page.offset, code=page.code) if page.name else None
            if not page.name:
                found.append(page.kind or "unknown")
            elif page.code:
                found.append("code" if at is not None and at // HUGE in spans else "small code")
            else:
                found.append("objects' data")
        return found

    def tags(self, native: Snapshot, space: Snapshot, huge: set[int], shares: dict[str, float]):
        """The TLB tag of each page (see tlbsim.c).

        Args:
            native: the workload's address space without anything.
            space: that which `huge` is of.
            huge: 2 MiB pages that hold files, by address.
            shares: of each kind of anonymous memory, what is on huge pages.
        """
        anonymous: set[int] = set()
        for kind, share in shares.items():
            chunks = sorted({page.address // HUGE for page in self.pages if page.kind == kind})
            anonymous |= spread(chunks, share)
        tags = (ctypes.c_uint64 * len(self.pages))()
        for number, page in enumerate(self.pages):
            address, is_huge = page.address, page.address // HUGE in anonymous and page.kind
            if page.name:
                found = native.find(page.name, page.offset, code=page.code)
                base, its_base = native.base(page.name), space.base(page.name)
                if found is not None and base is not None and its_base is not None:
                    address = found - base + its_base
                    is_huge = address // HUGE in huge
            page_number = address // HUGE if is_huge else address >> 12
            tags[number] = page_number << 2 | (SIZE_2M if is_huge else SIZE_4K)
        return tags


def build(directory: Path) -> dict[str, Path]:
    found = {}
    for name in ("pagetrace", "mapsnap", "tlbsim"):
        found[name] = directory / f"{name}.so"
        command = ["gcc", "-O2", "-march=native", "-shared", "-fPIC", "-o", str(found[name])]
        subprocess.run([*command, str(HERE / "tlb" / f"{name}.c")], check=True)
    return found


def run(command: list[str], environ: dict[str, str], maps: Path) -> Snapshot:
    """Run the workload without address space randomisation; its address space at the last mark."""
    subprocess.run(["setarch", "-R", *command], env={**environ, "PAGE_WALKS_MAPS": str(maps)},
                   check=True, stdout=subprocess.DEVNULL)  # fmt: skip
    return Snapshot.read(maps)


def record(command: list[str], libraries: dict[str, Path], directory: Path, marks: int, pairs: int):
    """Run the workload under QEMU, and record what is between its last marks."""
    plugin = (
        f"file={libraries['pagetrace']},out={directory}/trace,first={marks - 2 * pairs + 1},"
        f"count={2 * pairs},data=1"
    )
    settings = {
        "LD_PRELOAD": libraries["mapsnap"],
        "PAGE_WALKS_MAPS": directory / "traced.maps",
        "PAGE_WALKS_FROM": "/proc/self/maps",
        "PAGE_WALKS_LAST": marks,
    }
    given = [word for name, value in settings.items() for word in ("-E", f"{name}={value}")]
    subprocess.run(
        ["qemu-x86_64", "-cpu", "max", "-seed", "1", *given, "-plugin", plugin, *command],
        env={**ENVIRONMENT, "PAGE_PRIMER": "0"}, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def snapshots(command: list[str], listed: str, directory: Path, preload: Path):
    """The address space of each variant of `page-primer bench`."""
    environ = {
        **ENVIRONMENT, "LD_PRELOAD": str(preload),
        "PAGE_PRIMER_IMAGE_DIR": str(directory), "PAGE_PRIMER_MLOCK": "off",
    }  # fmt: skip
    found: dict[str, Snapshot] = {}
    with interpreter.Copy(command, os.environ) as aligned:
        for variant in variants.parse(listed):
            its_command, its = list(command), variant.environment(environ)
            if variant.aligned:
                its_command, its = aligned.command, {**its, **aligned.environment}
            maps = directory / f"{variant.name}.maps"
            # Once before, so that images are there.
            for _ in range(2 if variant.primed else 1):
                found[variant.name] = run(variant.command(its_command), its, maps)
    return found


def policies(
    trace: Trace, found: dict[str, Snapshot], everything: set[int], asked: list[str]
) -> dict[str, Any]:
    """Tags by name: 4 KiB pages, rules, shares that were asked for, what the variants obtained."""
    native = found["off"]
    tags = {
        "4 KiB pages": trace.tags(native, native, set(), {}),
        "per segment": trace.tags(native, native, per_segment(native), {}),
        "all spans": trace.tags(native, native, everything, {}),
        "all spans and heap": trace.tags(native, native, everything, dict.fromkeys(KINDS, 1.0)),
    }
    for text in asked:
        arenas, heap = (float(word) / 100 for word in text.split(","))
        shares = {"arena": arenas, "brk": heap}
        tags[f"all spans, heap {text} %"] = trace.tags(native, native, everything, shares)
    for name, space in found.items():
        files = [area for area in space.areas if area.path.startswith(("/", "/memfd:"))]
        huge = {chunk for area in files for chunk in area.huge_chunks}
        shares = {kind: space.share(kind) for kind in KINDS}
        tags[f"obtained: {name}"] = trace.tags(native, space, huge, shares)
    return tags


def replay(
    trace: Trace, tags: dict[str, Any], places: list[str], simulator: ctypes.CDLL, loops: int
) -> list[dict[str, Any]]:
    """Walks an iteration for each core, number of processes and set of huge pages."""

    def one(job):
        core, processes, name = job
        by_page = (ctypes.c_uint64 * len(trace.pages))()
        result = simulate(
            simulator, trace.records, tags[name], core, *SCENARIOS[processes], by_page
        )
        per = loops * SCENARIOS[processes][0]
        by_place = dict.fromkeys(sorted(set(places)), 0.0)
        for place, walks in zip(places, by_page, strict=True):
            by_place[place] += walks / per
        return {
            "core": core.name, "processes": int(processes), "pages": name,
            "code_walks": result.walks / per, "data_walks": result.data_walks / per,
            "walks_by_place": by_place,
        }  # fmt: skip

    jobs = [(core, count, name) for core in CORES for count in SCENARIOS for name in tags]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(one, jobs))
    bases = {(row["core"], row["processes"]): row["code_walks"] + row["data_walks"]
             for row in rows if row["pages"] == "4 KiB pages"}  # fmt: skip
    for row in rows:
        base = bases[row["core"], row["processes"]]
        row["ratio"] = (row["code_walks"] + row["data_walks"]) / base if base else 1.0
    return rows


def table(rows: list[dict[str, Any]], processes: int) -> str:
    names = list(dict.fromkeys(row["pages"] for row in rows))
    title = f"{processes} process{'es' if processes > 1 else ''} a core"
    lines = [f"| {title} | " + " | ".join(core.title for core in CORES) + " |"]
    lines.append("|---" * (len(CORES) + 1) + "|")
    for name in names:
        cells = [next(row for row in rows if row["pages"] == name and row["core"] == core.name
                      and row["processes"] == processes) for core in CORES]  # fmt: skip
        if name == "4 KiB pages":
            texts = [f"1.00 ({row['code_walks'] + row['data_walks']:.0f})" for row in cells]
        else:
            texts = [f"{row['ratio']:.2f}" for row in cells]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def table_of_places(rows: list[dict[str, Any]], core: Core, processes: int) -> str:
    its = [row for row in rows if row["core"] == core.name and row["processes"] == processes]
    base = sum(its[0]["walks_by_place"].values()) or 1
    places = list(its[0]["walks_by_place"])
    lines = [f"| {core.title}, {processes} processes | " + " | ".join(places) + " |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for row in its:
        texts = [f"{row['walks_by_place'][place] / base:.3f}" for place in places]
        lines.append(f"| {row['pages']} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", default="flask", choices=WORKS)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--loops", type=int, default=20, help="iterations that are traced")
    parser.add_argument("--variants", default=VARIANTS, help="as page-primer bench has them")
    parser.add_argument("--shares", nargs="*", default=[], metavar="ARENAS,HEAP",
                        help="rows with so much on huge pages, per cent")  # fmt: skip
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    measured = kept.commit()  # now: files may change while it runs
    with tempfile.TemporaryDirectory(prefix="page-walks-", dir="/var/tmp") as name:
        directory = Path(name)
        python = python_for(options.work, options.python, directory / "venv")
        command = [python, str(script(options.work)), str(options.loops), "1"]
        packages = versions(python, options.work)
        libraries = build(directory)
        found = snapshots(command, options.variants, directory, libraries["mapsnap"])
        record(command, libraries, directory, found["off"].marks, 1)
        simulator = ctypes.CDLL(str(libraries["tlbsim"]))
        trace = Trace(directory, simulator)
        everything = spans(found["off"])
        places = trace.places(found["off"], everything)
        tags = policies(trace, found, everything, options.shares)
        rows = replay(trace, tags, places, simulator, options.loops)
    code = [number for number, visits in enumerate(trace.visits) if visits]
    print(f"{options.work}: {sum(trace.instructions) / options.loops / 1e6:.2f} M instructions an "
          f"iteration, {len(code)} pages of code, {len(trace.pages) - len(code)} of data; page "
          "walks an iteration on 4 KiB pages (in brackets), ratios to them\n")  # fmt: skip
    print("\n\n".join(table(rows, SCENARIOS[processes][0]) for processes in SCENARIOS))
    print("\n" + table_of_places(rows, CORES[0], SCENARIOS["4"][0]))
    if options.json:
        result = {
            "python": sys.version.split()[0],
            "packages": packages,
            "instructions": sum(trace.instructions) / options.loops,
            "code_pages": len(code),
            "data_pages": len(trace.pages) - len(code),
            "shares": {name: {kind: space.share(kind) for kind in KINDS}
                       for name, space in found.items()},
            "results": rows,
        }  # fmt: skip
        kept.write(options.json, measured, result)


if __name__ == "__main__":
    main()
