"""What priming costs, beside the plain work that it cannot do without.

    python benchmarks/prime_cost.py [--python PATH] [--rounds N] [--directory DIR] [--json FILE]

Every number comes from a process of its own, started anew, and every round runs all of them in
turns, so that what slows the machine for a while slows both sides of a comparison. Printed are
medians over the rounds; a ratio is taken within each round. Milliseconds are those of the call
`page_primer.prime()` as its caller sees them; `in report` is what the report says of the same call,
which leaves out the import of the package's own modules at the first call.

The plain work: to write an image, copying as many bytes from file to file in 1 MiB blocks; to prime
with an image that is there already, mapping with MAP_POPULATE what priming locks.
"""

from __future__ import annotations

# Only what costs the measured processes little: each library loaded is one more to lock.
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

BLOCK = 1 << 20
FORKS = 20

Result = dict[str, Any]


# --------------------------------------------------------- steps, each in a process of its own ---


def first(image_dir: str) -> Result:
    """Prime where no image is, or one is, as the directory may be."""
    return _prime(image_dir)


def first_timed(image_dir: str) -> Result:
    """The same with the lock calls timed: in them the kernel populates pages."""
    return _prime_timed(image_dir)


def cached(image_dir: str) -> Result:
    """Prime with the image that is there, and again with nothing new; and what was locked."""
    result = _prime(image_dir)
    import page_primer

    again = []
    for _ in range(FORKS):
        began = time.perf_counter()
        page_primer.prime(image_dir=image_dir)
        again.append(_since(began))
    return {**result, "again": _median(again)}


def cached_timed(image_dir: str) -> Result:
    return _prime_timed(image_dir)


def fork(image_dir: str) -> Result:
    """fork and wait before and after priming, and priming in a forked child."""
    bare = [_fork() for _ in range(FORKS)]
    # What the modules' objects cost a fork is not what huge pages and locks cost it.
    import page_primer.apply.process  # noqa: F401

    before = [_fork() for _ in range(FORKS)]
    result = _prime(image_dir)
    after = [_fork() for _ in range(FORKS)]
    return {
        **result,
        "bare": _median(bare),
        "before": _median(before),
        "after": _median(after),
        **_in_child(image_dir),
        "locked": _locked(),
    }


def populate(work: str) -> Result:
    """Map with MAP_POPULATE what priming locks, but for writable data, which it locks on fault."""
    import mmap

    with open(f"{work}/locked.json") as file:
        wanted = json.load(file)
    began = time.perf_counter()
    maps = []
    size = 0
    for path, offset, length, executable in wanted:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        protection = mmap.PROT_READ | (mmap.PROT_EXEC if executable else 0)
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        maps.append(mmap.mmap(fd, length, flags=flags, prot=protection, offset=offset))
        os.close(fd)
        size += length
    return {"ms": _since(began), "bytes": size}


def copy(work: str) -> Result:
    """Copy a file of as many bytes as an image has written, within its directory."""
    began = time.perf_counter()
    source = os.open(f"{work}/source", os.O_RDONLY | os.O_CLOEXEC)
    target = os.open(f"{work}/copy", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
    size = 0
    while block := os.read(source, BLOCK):
        size += os.write(target, block)
    os.close(source)
    os.close(target)
    spent = _since(began)
    os.unlink(f"{work}/copy")
    return {"ms": spent, "bytes": size}


def _prime_timed(image_dir: str) -> Result:
    spent = _time_locks()
    return {**_prime(image_dir), "locks": spent[0]}


def _time_locks() -> list[float]:
    """Have the lock calls timed from now on; their milliseconds add up in the list."""
    from page_primer import _core

    plain, spent = _core.lock, [0.0]

    def lock(*args: int) -> None:
        began = time.perf_counter()
        try:
            plain(*args)
        finally:
            spent[0] += _since(began)

    _core.lock = lock
    return spent


def _prime(image_dir: str) -> Result:
    began = time.perf_counter()
    import page_primer

    imported = _since(began)
    began = time.perf_counter()
    report = page_primer.prime(image_dir=image_dir)
    spent = _since(began)
    if report.reason is not None:
        sys.exit(f"not primed: {report.summary()}")
    return {
        "ms": spent,
        "in_report": report.milliseconds,
        "import_page_primer": imported,
        "written": sum(o.written_bytes for o in report.objects if o.path in report.moved),
        "locked_bytes": report.locked_bytes,
        "code_bytes": report.interpreter.code_bytes if report.interpreter else 0,
        "huge_bytes": report.interpreter.code_huge_bytes if report.interpreter else 0,
        "place": report.interpreter.place if report.interpreter else "",
    }


def _fork() -> float:
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return _since(began)


def _in_child(image_dir: str) -> Result:
    """Milliseconds of prime() in a forked child, which has to lock for itself, and of the lock
    calls in another."""
    import page_primer

    result = {}
    for name in ("child", "child_locks"):
        reader, writer = os.pipe()
        if os.fork() == 0:
            spent = _time_locks() if name == "child_locks" else [0.0]
            began = time.perf_counter()
            page_primer.prime(image_dir=image_dir)
            whole = _since(began)
            os.write(writer, str(spent[0] or whole).encode())
            os._exit(0)
        os.wait()
        result[name] = float(os.read(reader, 100))
    return result


def _locked() -> list[tuple[str, int, int, bool]]:
    """(path, offset, bytes, executable) of this process's locked mappings that are not writable."""
    from page_primer.kernel import smaps

    return [
        (m.path, m.offset, m.size, m.executable)
        for m in smaps.read_smaps()
        if m.is_locked and not m.writable and m.path.startswith("/")
    ]


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


MEASURED = (first, first_timed, cached, cached_timed, fork, populate, copy)
STEPS: dict[str, Callable[[str], Result]] = {step.__name__: step for step in MEASURED}


# ---------------------------------------------------------------------------------- the driver ---


def run(python: str, step: str, directory: str, work: str) -> Result:
    """Run one step in a fresh process."""
    import subprocess

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PAGE_PRIMER")}
    # As an installer leaves it: compiled. The first process writes here what the others read.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = f"{work}/bytecode"
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [python, os.path.abspath(__file__), "--step", step, directory],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    result: Result = json.loads(done.stdout)
    return result


def measure(python: str, rounds: int, work: str) -> dict[str, list[Result]]:
    """All steps, in turns; the results of each, one a round."""
    import shutil

    store = f"{work}/store"
    os.mkdir(store)
    # One round that is not counted, for bytecode and the page cache, and for what the plain
    # work is to be done with.
    written = run(python, "first", store, work)["written"]
    with open(f"{work}/locked.json", "w") as file:
        json.dump(run(python, "fork", store, work)["locked"], file)
    with open(f"{work}/source", "wb") as file:
        file.write(os.urandom(written))
    results: dict[str, list[Result]] = {step: [] for step in STEPS}
    for index in range(rounds):
        for step in ("first", "first_timed"):
            # Beside each, for a copy's time depends on what the disk was given to do before.
            results["copy"].append(run(python, "copy", work, work))
            fresh = f"{work}/fresh-{index}-{step}"
            os.mkdir(fresh)
            results[step].append(run(python, step, fresh, work))
            shutil.rmtree(fresh)
        for step in ("cached", "populate", "cached_timed", "fork"):
            place = work if step == "populate" else store
            results[step].append(run(python, step, place, work))
    return results


def summarize(results: dict[str, list[Result]]) -> Result:
    """Medians over the rounds, and ratios within each."""

    def values(step: str, name: str = "ms") -> list[float]:
        return [result[name] for result in results[step]]

    def middle(step: str, name: str = "ms") -> float:
        return _median(values(step, name))

    def spread(over: list[float], under: list[float]) -> Result:
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        return {"median": _median(ratios), "min": min(ratios), "max": max(ratios)}

    copies = values("copy")  # two a round, each before the step it is beside

    def above(name: str) -> Result:
        plain = values("populate")
        more = [a - b for a, b in zip(values("cached", name), plain, strict=True)]
        return {"median": _median(more), "min": min(more), "max": max(more)}

    return {
        "rounds": len(results["first"]),
        "place": results["cached"][0]["place"],
        "code_bytes": results["cached"][0]["code_bytes"],
        "code_huge_bytes": results["cached"][0]["huge_bytes"],
        "written_bytes": results["first"][0]["written"],
        "locked_bytes": results["cached"][0]["locked_bytes"],
        "populated_bytes": results["populate"][0]["bytes"],
        "import_page_primer_ms": middle("cached", "import_page_primer"),
        "first_ms": middle("first"),
        "first_in_report_ms": middle("first", "in_report"),
        "first_locks_ms": middle("first_timed", "locks"),
        "copy_ms": _median(copies),
        "first_over_copy": spread(values("first"), copies[0::2]),
        "first_in_report_over_copy": spread(values("first", "in_report"), copies[0::2]),
        "cached_ms": middle("cached"),
        "cached_in_report_ms": middle("cached", "in_report"),
        "cached_locks_ms": middle("cached_timed", "locks"),
        "populate_ms": middle("populate"),
        "cached_less_populate_ms": above("ms"),
        "cached_in_report_less_populate_ms": above("in_report"),
        "again_ms": middle("cached", "again"),
        "child_ms": middle("fork", "child"),
        "child_locks_ms": middle("fork", "child_locks"),
        "fork_bare_ms": middle("fork", "bare"),
        "fork_before_ms": middle("fork", "before"),
        "fork_after_ms": middle("fork", "after"),
        "fork_after_over_before": spread(values("fork", "after"), values("fork", "before")),
    }


def table(s: Result) -> str:
    """The summary as text."""

    def line(name: str, ms: float, note: str = "") -> str:
        return f"{name:42}{ms:9.2f} ms  {note}".rstrip()

    def size(count: int) -> str:
        return f"{count / (1 << 20):.1f} MiB"

    def span(spread: Result, form: str = ".1f") -> str:
        numbers = [format(spread[name], form) for name in ("median", "min", "max")]
        return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"

    def compared(name: str, ratio: Result, form: str = ".1f") -> str:
        return f"  {name:38}{span(ratio, form):>26}"

    forks = s["fork_after_over_before"]
    return "\n".join(
        [
            f"{size(s['code_bytes'])} of code, {size(s['code_huge_bytes'])} of it on huge pages, "
            f"{s['place']}; medians of {s['rounds']} rounds",
            "",
            line("import page_primer", s["import_page_primer_ms"]),
            line("first prime, no image yet", s["first_ms"], f"{size(s['written_bytes'])} written"),
            line("  in report", s["first_in_report_ms"]),
            line("  locks: population of pages", s["first_locks_ms"],
                 f"{size(s['locked_bytes'])} locked"),
            line("copy of as many bytes, file to file", s["copy_ms"], size(s["written_bytes"])),
            compared("first prime / copy", s["first_over_copy"]),
            compared("  in report", s["first_in_report_over_copy"]),
            "",
            line("prime, image there", s["cached_ms"], f"{size(s['locked_bytes'])} locked"),
            line("  in report", s["cached_in_report_ms"]),
            line("  locks", s["cached_locks_ms"]),
            line("mmap(MAP_POPULATE) of the same", s["populate_ms"], size(s["populated_bytes"])),
            compared("difference, ms", s["cached_less_populate_ms"]),
            compared("  in report", s["cached_in_report_less_populate_ms"]),
            "",
            line("prime again, nothing new", s["again_ms"]),
            line("prime in a forked child", s["child_ms"]),
            line("  locks", s["child_locks_ms"]),
            line("fork and wait, nothing imported", s["fork_bare_ms"]),
            line("fork and wait, page_primer imported", s["fork_before_ms"]),
            line("fork and wait, primed", s["fork_after_ms"]),
            compared("primed / imported", forks, ".2f"),
        ]
    )  # fmt: skip


def main() -> int:
    if sys.argv[1:2] == ["--step"]:
        step, directory = sys.argv[2:]
        sys.stdout.write(json.dumps(STEPS[step](directory)))
        return 0

    import argparse
    import shutil
    import subprocess
    import tempfile
    from pathlib import Path

    import kept

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, metavar="PATH",
                        help="the interpreter to measure (default: this one)")  # fmt: skip
    parser.add_argument("--rounds", default=9, type=int, help="default: %(default)s")
    parser.add_argument("--directory", default="/var/tmp", metavar="DIR",
                        help="where images go, in a temporary directory of its own: choose a "
                        "file system that has huge pages (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    measured = kept.commit()
    work = tempfile.mkdtemp(prefix="prime-cost-", dir=options.directory)
    try:
        summary = summarize(measure(options.python, options.rounds, work))
    except subprocess.CalledProcessError as error:
        print(f"prime_cost: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(table(summary))
    if options.json:
        kept.write(options.json, measured, summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
