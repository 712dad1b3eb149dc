"""No function leaks: memory, mappings, descriptors and locks are flat over many calls, of each
function of the C core and each public one, and of none are we unaware."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import leaks

import page_primer
from page_primer import _core

PROGRAM = str(Path(leaks.__file__))
# What takes longer than microseconds is called less often.
ROUNDS = {"prime": 30, "restore": 50, "status": 50, "Report": 200, "swap": 300,
          "arenas_install": 100, "arenas_retire": 100}  # fmt: skip


@pytest.fixture(scope="module")
def grown(python):
    """What each case took in a process of its own kind: one for all."""
    return run(python, {name: ROUNDS.get(name, 1000) for name in leaks.CASES})


def run(python, given):
    command = [python, PROGRAM, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(more, rounds):
    """Less than one of anything a call; some of it comes and goes."""
    assert more["descriptors"] == more["locked"] == 0, more
    assert more["mappings"] <= 2 and more["size"] <= 2048, more
    assert more["blocks"] < leaks.allowed_blocks(rounds), more
    assert more.get("malloc", 0) < leaks.allowed_malloc(rounds), more


def test_no_function_is_forgotten():
    core = {name for name in dir(_core) if callable(getattr(_core, name))}
    public = set(page_primer.__all__)
    made = {"Area", "Descriptor"}  # in the cases of reserve() and opened()
    assert set(leaks.CASES) | made == core | public


@pytest.mark.parametrize("name", leaks.CASES)
def test_flat(name, grown):
    check(grown[name], ROUNDS.get(name, 1000))


@pytest.mark.slow
def test_prime_and_restore_are_flat_for_long(python):
    """`make sanitize` does it ten thousand times."""
    more = run(python, {"prime": 1000})["prime"]
    check(more, 1000)
    assert more["mappings"] <= 1 and more["size"] <= 1024, more


def test_a_leak_would_be_seen(python, tmp_path):
    """The measure itself: one descriptor, one mapping, one block of memory a call."""
    program = tmp_path / "leaky.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(Path(PROGRAM).parents[1])!r})\n"
        "import os; from harness import leaks\n"
        "kept = []\n"
        "def leaky():\n"
        "    kept.append(object())\n"
        "    os.dup(0)\n"
        "    area = leaks._core.reserve(4096, 1 << 21, 0)\n"
        "    area.unmap()\n"
        "    leaks._core.map(area.address, 4096, 3, leaks.ANONYMOUS, -1, 0)\n"
        "leaks.CASES['leaky'] = leaky\n"
        "leaks.main()\n"
    )
    done = subprocess.run(
        [sys.executable, str(program), '{"leaky": 100}'], capture_output=True, text=True, timeout=60
    )
    more = json.loads(done.stdout)["leaky"]
    assert more["descriptors"] >= 100 and more["mappings"] >= 100 and more["blocks"] >= 100, more
    with pytest.raises(AssertionError):
        check({**more, "descriptors": 0, "mappings": 0}, 100)
