"""What a start costs in two commits, in one run.

    python benchmarks/against.py COMMIT [--rounds N] [--python PYTHON] [--directory DIR]
                                        [--json FILE]

COMMIT is checked out and its C core built in a temporary directory; the other is the working tree.
Each round starts a fresh interpreter with each, in turns, and measures inside it: `import
page_primer`, the first `prime()` where the image is there, and one of a thousand more with nothing
new, in milliseconds of wall time and of processor time. Printed are medians over the rounds, and of
the ratios within each round, with the interval in which the middle nine tenths of them lie.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

import kept

ROOT = Path(__file__).resolve().parents[1]
TITLES = {
    "import": "import page_primer",
    "prime": "prime(), the image is there",
    "again": "prime() again, nothing new",
}
# Without site: what is imported is imported by us alone.
PROGRAM = """
import sys, time
sys.path.append(sys.argv[1])
clocks = time.perf_counter, time.process_time
took = []
def measure(action, times=1):
    began = [clock() for clock in clocks]
    for _ in range(times):
        found = action()
    took.append([(clock() - start) * 1000 / times for clock, start in zip(clocks, began)])
    return found
page_primer = measure(lambda: __import__("page_primer"))
report = measure(lambda: page_primer.prime(image_dir=sys.argv[2]))
measure(lambda: page_primer.prime(image_dir=sys.argv[2]), 1000)
assert report.reason is None, report
print(took, report.interpreter.backing if report.interpreter else None, sep="\\n")
"""
Times = dict[str, list[tuple[float, float]]]  # wall and processor, one a round


def check_out(commit: str, directory: Path, python: str) -> None:
    """A commit's tree with its C core built."""
    directory.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    build(directory, directory, python)


def build(tree: Path, target: Path, python: str) -> None:
    """Build the C core of a tree, as an installation does, into another or the same."""
    subprocess.run(
        [python, "setup.py", "-q", "build_ext", "--build-lib", str(target),
         "--build-temp", f"{target}/temporary"],
        cwd=tree, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def once(python: str, tree: Path, work: Path) -> list[list[float]]:
    """One start; bytecode and image are there from the first on, which does not count."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PAGE_PRIMER", "PYTHON"))}
    done = subprocess.run(
        [python, "-S", "-c", PROGRAM, str(tree), str(work / "store")],
        env={**environ, "PYTHONPYCACHEPREFIX": str(work / "bytecode")},
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    took, backing = done.stdout.splitlines()
    if backing != "image":
        sys.exit(f"against: {python} is primed by {backing} here, not by an image")
    found: list[list[float]] = json.loads(took)
    return found


def measure(python: str, trees: dict[str, Path], rounds: int, work: Path) -> dict[str, Times]:
    found: dict[str, Times] = {name: {what: [] for what in TITLES} for name in trees}
    order = list(trees)
    for number in range(rounds + 2):
        for name in order:
            for what, (wall, processor) in zip(
                TITLES, once(python, trees[name], work / name), strict=True
            ):
                if number >= 2:
                    found[name][what].append((wall, processor))
        order.reverse()
    return found


def row(what: str, found: dict[str, Times]) -> dict[str, float]:
    """The medians of both, and of the ratios in each round with the middle nine tenths."""
    then, now = (found[name][what] for name in ("then", "now"))
    result = {}
    for kind, which in (("wall", 0), ("cpu", 1)):
        pairs = [(one[which], other[which]) for one, other in zip(then, now, strict=True)]
        ratios = [b / a for a, b in pairs if a]
        cuts = quantiles(ratios, n=20, method="inclusive") if len(ratios) > 1 else ratios
        result |= {
            f"{kind}_then_ms": median(a for a, _ in pairs),
            f"{kind}_now_ms": median(b for _, b in pairs),
            f"{kind}_ratio": median(ratios),
            f"{kind}_low": cuts[0],
            f"{kind}_high": cuts[-1],
        }
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commit")
    parser.add_argument("--rounds", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--python", default=sys.executable, help="default: this one")
    parser.add_argument("--directory", default="/var/tmp", metavar="DIR",
                        help="for images: a file system with huge pages")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    measured = kept.commit()
    work = Path(tempfile.mkdtemp(prefix="against-", dir=options.directory))
    try:
        trees = {"then": work / "then-tree", "now": work / "now-tree"}
        check_out(options.commit, trees["then"], sys.executable)
        shutil.copytree(ROOT / "page_primer", trees["now"] / "page_primer",
                        ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
        build(ROOT, trees["now"], sys.executable)
        for name in trees:
            (work / name).mkdir()
        found = measure(options.python, trees, options.rounds, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    rows = {what: row(what, found) for what in TITLES}
    if options.json:
        kept.write(options.json, measured, rows)
    print(f"{options.python}, {options.rounds} rounds; {options.commit} and the working tree, ms")
    for what, title in TITLES.items():
        for kind, name in (("wall", title), ("cpu", "  of processor time")):
            r = {key: rows[what][f"{kind}_{key}"]
                 for key in ("then_ms", "now_ms", "ratio", "low", "high")}  # fmt: skip
            print("{:30}{then_ms:9.4f}{now_ms:9.4f}  ratio {ratio:.2f} "
                  "({low:.2f} to {high:.2f})".format(name, **r))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
