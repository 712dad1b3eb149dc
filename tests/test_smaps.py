"""What is read of maps and smaps, and how it is kept."""

from __future__ import annotations

import os
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from page_primer.kernel import smaps

PAGES = st.lists(st.integers(0, 1 << 20), min_size=2, max_size=40, unique=True).map(sorted)


def line_of(start: int, end: int, path: bytes) -> bytes:
    return b"%x-%x r-xp 00001000 08:01 77 %s" % (start << 12, end << 12, path)


@given(PAGES, st.tuples(st.integers(-1, 1 << 20), st.integers(-1, 1 << 20)).map(sorted))
def test_packed_mappings_are_what_they_were_made_of(bounds, wanted):
    """Each is found by the addresses that it shares with others, as in a list of them."""
    lines = [line_of(a, b, b"/lib/%d" % a) for a, b in pairwise(bounds)]
    lines = lines[::2]  # with gaps
    one_by_one = [smaps._mapping(line, {}) for line in lines]
    packed = smaps.Mappings(smaps._fields(line, {}) for line in lines)
    start, end = (page << 12 for page in wanted)

    def texts(mappings):
        return [repr(one) for one in mappings]

    assert len(packed) == len(lines)
    assert texts(packed) == texts(one_by_one) == texts(packed[:])
    assert texts(smaps.overlapping(packed, start, end)) == texts(
        one for one in one_by_one if one.start < end and start < one.end
    )
    assert texts(smaps.overlapping(packed, start, end)) == texts(
        smaps.overlapping(one_by_one, start, end)
    )


def test_names_are_bytes():
    for path in (b"/\xff\xfe caf\xc3\xa9", b"/with\\012newline", b"/a b  c"):
        read = smaps._mapping(line_of(1, 2, path), {})
        assert os.fsencode(read.path) == path.replace(b"\\012", b"\n")
