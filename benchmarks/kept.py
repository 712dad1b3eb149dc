"""Results as they are kept: JSON with the command, the commit and the machine in it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from page_primer.bench import machine

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit that is measured, with a `+` where files differ from it; to be asked for before a
    measurement, during which files may change."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def command() -> str:
    """The benchmark as it was started, without where its result goes."""
    words = [f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    while "--json" in words:
        at = words.index("--json")
        del words[at : at + 2]
    return shlex.join(word for word in words if not word.startswith("--json="))


def write(path: Path, measured: str, result: dict[str, Any]) -> None:
    """Write a result of a commit; where it has no `machine`, of this one. What is in it of this
    environment is named `python`."""
    ran_on = result.get("machine") or machine.describe()
    of = {"command": command(), "commit": measured, "machine": ran_on}
    whole = {**of, **result, **of}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1).replace(sys.executable, "python") + "\n")
