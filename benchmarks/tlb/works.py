"""The workloads that can be traced, and a Python that has the packages they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

# By distribution. Those of the first two are in page-primer's own extra `test`, whatever their
# version; what is pinned is installed from the package index where it is not there.
WORKS: dict[str, dict[str, str]] = {
    "flask": {"flask": "", "werkzeug": "", "jinja2": ""},
    "django": {"django": ""},
    "dataframe": {"pandas": "3.1.1", "duckdb": "2.0.1", "numpy": "2.4.6"},
    "sklearn": {"scikit-learn": "1.9.1", "scipy": "1.17.1", "numpy": "2.4.6"},
}

_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def script(work: str) -> Path:
    return HERE / f"{work}_work.py"


def versions(python: str, work: str) -> dict[str, str]:
    """What of a workload's packages a Python has."""
    command = [python, "-c", _VERSIONS, *WORKS[work]]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def python_for(work: str, python: str, directory: Path) -> str:
    """A Python with the packages of a workload at their versions: the given one, or that of a
    virtual environment which is made for it in a directory."""
    wanted, found = WORKS[work], versions(python, work)
    if all(found.get(name) == pin for name, pin in wanted.items() if pin):
        return python
    print(f"{work}: a virtual environment with {', '.join(wanted)}", file=sys.stderr)
    subprocess.run([python, "-m", "venv", directory], check=True)
    own = os.path.join(directory, "bin", "python")
    pins = [f"{name}=={pin}" for name, pin in wanted.items()]
    install = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, "--only-binary", ":all:", *pins], check=True)
    return own
