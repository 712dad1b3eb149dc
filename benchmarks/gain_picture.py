"""README's picture: docs/gain.png, of figures that were measured before.

    python benchmarks/gain_picture.py [--output FILE]

Page walks are those of docs/benchmarks/page-walks-flask.json (benchmarks/page_walks.py), the first
request after a quiet spell is docs/locking.md's (make bench-pressure), memory a worker is
docs/heap.md's (benchmarks/memory.py): read from there, so that it says what the pages say.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
CORES = {"zen4": "Zen 4", "skx": "Skylake", "glc": "Golden Cove", "n1": "Neoverse N1"}
WALKS = {
    "per segment": "segment by segment",
    "obtained: code": "page-primer",
    "obtained: code+heap": "page-primer, heap=auto",
}
WORKERS = 8  # of docs/heap.md's table
COLOURS = ("#9aa5b1", "#f0a04b", "#3572a5", "#1d4e89")


def page_walks() -> dict[str, list[float]]:
    """Of four processes a core, by kind of pages: a ratio for each of CORES."""
    results = json.loads((DOCS / "benchmarks" / "page-walks-flask.json").read_text())["results"]
    found = {(r["core"], r["pages"]): r["ratio"] for r in results if r["processes"] == 4}
    return {name: [found[core, pages] for core in CORES] for pages, name in WALKS.items()}


def column(page: str, number: int, rows: dict[str, str]) -> dict[str, float]:
    """A column of the rows of a page's tables that begin so, under new names."""
    found = {}
    for row, name in rows.items():
        (line, *_) = re.findall(rf"^\| {re.escape(row)} \|(.*)$", (DOCS / page).read_text(), re.M)
        found[name] = float(line.split("|")[number])
    return found


def first_request() -> dict[str, float]:
    """Milliseconds, median."""
    rows = {"unprimed": "unprimed", "`remap` only": "huge pages\nonly", "both": "page-primer"}
    return column("locking.md", 0, rows)


def memory() -> dict[str, float]:
    """MiB (PSS) a worker."""
    rows = {"preloaded": "preloaded", "preloaded, `freeze`": "preloaded,\nfreeze=True"}
    return {name: pss / WORKERS for name, pss in column("heap.md", 0, rows).items()}


def figures() -> dict[str, Any]:
    """What the picture shows; it has them as its description too."""
    return {"page walks": page_walks(), "first request": first_request(), "memory": memory()}


def bars(pane: Any, values: dict[str, float], colours: Sequence[str], title: str) -> None:
    found = pane.bar(list(values), list(values.values()), color=colours, width=0.6)
    pane.bar_label(found, fmt="%.1f", fontsize=9)
    pane.set_title(title, fontsize=10)


def draw(output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(11.5, 3.3), width_ratios=(2.1, 1.2, 1)
    )
    walks = page_walks()
    for at, (name, ratios) in enumerate(walks.items()):
        places = [core + (at - 1) * 0.27 for core in range(len(CORES))]
        found = left.bar(places, ratios, 0.25, label=name, color=COLOURS[at + (at > 0)])
        left.bar_label(found, fmt="%.2f", fontsize=7)
    left.set_xticks(range(len(CORES)), CORES.values(), fontsize=8)
    left.set_ylim(0, 1.35)
    left.legend(fontsize=7, ncols=3, loc="upper center", frameon=False)
    left.set_title("page walks a request, 4 KiB pages = 1 (simulated)", fontsize=10)
    bars(middle, first_request(), COLOURS[:3], "first request when memory is short, ms")
    bars(right, memory(), COLOURS[0:3:2], "memory of a Django worker, MiB")
    for pane in (left, middle, right):
        pane.spines[["top", "right"]].set_visible(False)
        pane.tick_params(labelsize=8)
    figure.tight_layout()
    figure.savefig(output, dpi=120, metadata={"Description": json.dumps(figures())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DOCS / "gain.png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
