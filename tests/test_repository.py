"""Files for the place where the project is hosted: valid, and about commands that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/ISSUE_TEMPLATE/bug.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/environment.yml": "vendor.github-issue-forms",
    ".github/ISSUE_TEMPLATE/config.yml": "vendor.github-issue-config",
    "CITATION.cff": "vendor.citation-file-format",
}


def text_of(name):
    if not (ROOT / name).exists():
        pytest.skip(f"no {name}: an sdist has no hidden files")
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_valid(name):
    pytest.importorskip("check_jsonschema")
    text_of(name)
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", FILES[name], name],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_commands_without_a_suffix_are_linted():
    """ruff takes *.py by itself; the other Python programs are named for it, and for mypy."""
    pytest.importorskip("ruff")
    found = (path for path in (ROOT / "tools").iterdir() if path.is_file())
    programs = {
        str(path.relative_to(ROOT))
        for path in found
        if path.read_text().startswith("#!/usr/bin/env python3")
    }
    assert programs
    shown = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--show-files", "."],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    linted = {str(Path(line).relative_to(ROOT)) for line in shown.stdout.splitlines()}
    assert programs <= linted
    (typed,) = re.findall(r"^files = (.*)$", (ROOT / "tests/mypy.ini").read_text(), re.MULTILINE)
    assert programs <= set(typed.split(", "))


def test_lines_that_are_never_executed_are_there():
    """Those of which tools/coverage_reasons.txt says why; `make coverage` sees the rest."""
    text = (ROOT / "tools/coverage_reasons.txt").read_text()
    keys = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    assert len(keys) == len({*keys})
    for key in keys:
        name, _, rest = key.partition(" ")
        function, _, line = rest.partition(": ")
        source = (ROOT / "page_primer" / name).read_text().splitlines()
        wanted = line or f"{function.rpartition('.')[2]}("
        assert any(row.strip() == wanted if line else wanted in row for row in source), key


@pytest.mark.parametrize("name", ["bug", "environment"])
def test_forms_ask_for_the_doctors_output(name):
    assert "`page-primer doctor --json`" in text_of(f".github/ISSUE_TEMPLATE/{name}.yml")


def test_the_workflow_runs_what_there_is():
    """Targets of the Makefile, files, and all versions that the classifiers name."""
    workflow = text_of(".github/workflows/ci.yml")
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(
        r"\brun: (?:sudo (?:-H )?)?make (?:-C \S+ )?(.*)$", workflow, re.MULTILINE
    )
    words = {word for command in commands for word in shlex.split(command) if "=" not in word}
    assert words >= {"lint", "test", "fuzz", "sanitize", "packages"}
    for target in words:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for tool in re.findall(r"\btools/[\w-]+", workflow):
        assert (ROOT / tool).is_file(), tool
    classified = re.findall(r":: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
    (tested, *_) = re.findall(r"python: \[(.*)\]", workflow)
    assert tested == ", ".join(f'"{version}"' for version in classified)


def test_pre_commit_runs_what_make_lint_does():
    """Its hooks, which need no environment of pre-commit's, are among the lines of `make lint`."""
    hooks = re.findall(r"^ +entry: (.*)$", text_of(".pre-commit-config.yaml"), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    (lint,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert len(hooks) >= 6
    for hook in hooks:
        command = hook.replace(".venv/bin", "$(BIN)")
        assert f"\t{command}" in lint, hook
        program = hook.split()[0]
        assert program.startswith(".venv/") or (ROOT / program).is_file(), hook


def test_the_program_that_warms_is_small():
    """What needs no C is not in it."""
    source = re.sub(r"/\*.*?\*/", "", text_of("page_primer/launcher/warm.c"), flags=re.DOTALL)
    assert sum(bool(line.strip()) for line in source.splitlines()) < 200


def test_benchmarks_print_what_was_measured_and_no_goals():
    """Whoever runs `make bench` has none of its authors' goals."""
    for path in (ROOT / "benchmarks").glob("*.py"):
        printed = re.findall(r"print\((.*)", path.read_text())
        assert not re.search(r"goal|MISSED", " ".join(printed)), path
