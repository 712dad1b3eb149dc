"""Which tests are in one process under pytest-xdist, and which begin first: for conftest.py."""

from __future__ import annotations

__all__ = ["LONG", "scope_of"]

# What takes longest begins first, so that no process has it when all others have ended. A function
# that is named is a scope by itself; else a file is, whose tests share its fixtures.
LONG = (
    "tests/test_celery.py::test_a_thousand_tasks_of_one_child_each",
    "tests/test_gunicorn.py::test_two_hundred_re_forks",
    "tests/test_tools.py",
    "tests/test_refused.py",
    "tests/test_refused.py::test_each_call_refused_with_all_options",
    "tests/test_gunicorn.py::test_twenty_thousand_requests_under_churn",
    "tests/test_leaks.py::test_prime_and_restore_are_flat_for_long",
    "tests/test_gunicorn.py",
    "tests/test_run.py",
    "tests/test_heap.py",
    "tests/test_celery.py",
    "tests/test_bench.py",
    "tests/test_bench_parts.py",
    "tests/test_hostile.py",
    "tests/test_align_command.py",
    "tests/test_environments.py",
    "tests/test_interrupted.py",
    "tests/test_examples.py",
    "tests/test_prime.py",
    "tests/test_warm.py",
)


def scope_of(nodeid: str) -> str:
    """The tests that a test is in one process with."""
    function = nodeid.partition("[")[0]
    return function if function in LONG else function.partition("::")[0]
