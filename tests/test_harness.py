"""The rules of this directory: what tests have in common is in `harness`."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from harness.probes import PROBES

ROOT = Path(__file__).parents[1]


def imported(path):
    """The modules that a file imports, as it names them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


def test_nothing_imports_a_test():
    files = [
        path
        for folder in ("tests", "benchmarks", "tools", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or (path.parent.name == "tools" and b"python" in shebang(path))
    ]
    assert len(files) > 50
    wrong = {
        str(path.relative_to(ROOT)): name
        for path in files
        for name in imported(path)
        if name.split(".")[0].startswith(("test_", "conftest"))
    }
    assert wrong == {}


def shebang(path):
    return path.read_bytes().partition(b"\n")[0] if path.is_file() else b""


def test_probes_have_names_of_their_own():
    names = [f"{probe.look.__module__}.{probe.look.__name__}" for probe in PROBES.values()]
    assert len(set(names)) == len(names) > 20
    assert not any(name.endswith("._") for name in names)


def test_benchmarks_and_tools_find_the_harness():
    for script in ("benchmarks/pressure.py", "tools/matrix.py", "tools/align_check"):
        env = {**os.environ, "PYTHONPATH": ""}
        command = [sys.executable, str(ROOT / script), "--help"]
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
