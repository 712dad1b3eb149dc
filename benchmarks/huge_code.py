"""How much of each interpreter's code is on huge pages: primed, and by the rule of the known tools.

    python benchmarks/huge_code.py [--json FILE] [PYTHON ...]

By default of every CPython since 3.10 on this machine (those of Debian's and pyenv's usual places).
Each is started, looked at from outside, primed with images in a temporary directory, and looked at
again: of the bytes of its .text, those that smaps has on huge pages. `per segment` is what tools
attain at most that remap each executable segment by itself, whole huge pages of it alone;
`attainable` what lies in whole huge pages of the read-only run of segments that its code is in.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import kept
from tlb.layout import HUGE, Area

sys.path.insert(0, str(kept.ROOT / "tests"))

from harness import outside
from harness.interpreters import INTERPRETERS, is_shared, python_of
from harness.process import Process


def per_segment(text: outside.Text) -> int:
    """Bytes of huge pages that lie wholly inside one executable mapping of the object."""
    areas = (Area(v.start, v.end, v.perms, v.offset, v.path) for v in text.span_vmas)
    return HUGE * sum(len(area.chunks) for area in areas if "x" in area.permissions)


def measure(base: str, directory: Path) -> dict[str, Any]:
    python = python_of(directory, base)
    with Process(python) as process:
        version = process.run("import sys; result = sys.version.split()[0]")
        before = outside.text_of(process.pid)
        report = process.prime(image_dir=str(directory / "images"))
        text = outside.text_of(process.pid)
        if report["reason"]:
            raise SystemExit(f"{base}: not primed: {report['reason']}")
    return {
        "python": base, "version": version, "kind": "shared" if is_shared(base) else "static",
        "bytes": text.size, "unprimed": before.huge, "per_segment": per_segment(before),
        "attainable": text.attainable, "primed": text.huge,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", default=INTERPRETERS.values())
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    commit, rows = kept.commit(), []
    for number, base in enumerate(given.pythons):
        with tempfile.TemporaryDirectory(prefix="huge-code-", dir="/var/tmp") as name:
            rows.append(measure(base, Path(name) / str(number)))
    columns = ("unprimed", "per_segment", "attainable", "primed")
    print(f"{'CPython':10} {'kind':7} {'code, MiB':>9}" + "".join(f"{c:>13}" for c in columns))
    for row in rows:
        shares = "".join(f"{row[column] / row['bytes']:>12.1%} " for column in columns)
        print(f"{row['version']:10} {row['kind']:7} {row['bytes'] / (1 << 20):9.2f}{shares}")
    if given.json:
        kept.write(given.json, commit, {"interpreters": rows})


if __name__ == "__main__":
    main()
