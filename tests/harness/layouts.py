"""Images of libraries that no process has loaded."""

from __future__ import annotations

import os
from pathlib import Path

from harness import outside
from page_primer.elf import file as elf
from page_primer.elf.objects import Object, Region, Source, segments_of
from page_primer.images import layout

__all__ = ["laid_out"]

BASE = 0x7F0000000000


def laid_out(library: Path, *chunks: int) -> layout.Layout:
    """The image of chunks of a library's code, or of all of it."""
    fd = os.open(library, os.O_RDONLY)
    headers = elf.File(fd).program_headers()
    os.close(fd)
    segments = segments_of(headers, BASE, outside.PAGE)
    touched = tuple((chunk, outside.PMD) for chunk in chunks) or None
    source = Source.of(str(library), os.stat(library))
    obj = Object(
        library.name, str(library), BASE, headers, segments, source=source, touched=touched
    )
    code = next(segment for segment in segments if segment.code)
    start = -(-code.start // outside.PMD) * outside.PMD
    spans = [(start + n * outside.PMD, start + (n + 1) * outside.PMD) for n in chunks]
    regions = [Region(*span, elf.PF_R | elf.PF_X) for span in spans or [(code.start, code.end)]]
    return layout.lay_out(obj, regions, outside.PMD)
