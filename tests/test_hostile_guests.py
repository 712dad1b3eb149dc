"""Kernels that are set to give no huge pages, and such as lack what the environments are made with:
guests in qemu, where there is a runner for them."""

import pytest
from harness.environments import NOT, Unavailable
from harness.hostile_guests import GUESTS, rows_in, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.guest]
NEW, OLD = "6.18", "6.1"


@pytest.fixture(scope="module")
def outcomes():
    try:
        rows = rows_of(NEW, GUESTS)
    except Unavailable as why:
        pytest.skip(str(why))
    return {guest.name: row[2:] for guest, row in zip(GUESTS, rows, strict=True)}


@pytest.mark.parametrize("guest", GUESTS, ids=lambda guest: guest.name)
def test_a_kernel_that_gives_no_huge_pages(outcomes, guest):
    outcome, reason = outcomes[guest.name]
    if outcome != f"{NOT}: no whole huge page at this address":  # a random one
        assert outcome.partition(":")[0] == guest.outcome, (outcome, reason)


def test_what_a_kernel_does_not_have_is_unavailable():
    """Not a failure of ours: PR_SET_MDWE (6.3), PR_THP_DISABLE_EXCEPT_ADVISED (6.18)."""
    names = ["except advised", "memory-deny-write-execute"]
    try:
        rows = rows_in(OLD, *names)
    except Unavailable as why:
        pytest.skip(str(why))
    assert len(rows) == 3
    assert {(outcome, reason) for _, _, outcome, reason in rows} == {
        ("not tried", "this kernel has no such prctl()")
    }
