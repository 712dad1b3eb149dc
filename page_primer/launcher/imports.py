"""Prime libraries when they arrive: `page-primer run`, unless with `--no-late`.

A framework's integration knows when an application has been loaded; a launcher does not. It looks
after each extension module whether a library came with room for a huge page, which takes
microseconds, and primes then.
"""

from __future__ import annotations

# importlib.machinery's, which takes half a millisecond to import.
from _frozen_importlib_external import ExtensionFileLoader

from page_primer import _core, prime
from page_primer._lean import suppress
from page_primer.elf.objects import Object, Region, segments_of
from page_primer.kernel.thp import page_size, pmd_size
from page_primer.options import Options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from page_primer.report import Report


def watch(options: Options, tell: Callable[[Report], None]) -> None:
    """Look after each extension module that this process imports from now on.

    Args:
        options: for each call.
        tell: is given the report of each call.
    """
    plain = ExtensionFileLoader.exec_module
    pmd = pmd_size()
    known = {(base, headers) for _, base, headers in _core.objects()[2]}

    # After the module has been executed, not as soon as it is there: what that has touched of a
    # library tells which of its chunks are worth a move (hot.py).
    def exec_module(self: ExtensionFileLoader, module: ModuleType) -> None:
        plain(self, module)
        with suppress(Exception):  # the import is the host's
            new = {(base, headers) for _, base, headers in _core.objects()[2]} - known
            known.update(new)
            if any(_has_room(base, headers, pmd) for base, headers in new):
                tell(prime(options))

    if pmd:
        ExtensionFileLoader.exec_module = exec_module  # type: ignore[method-assign]


def _has_room(base: int, headers: bytes, pmd: int) -> bool:
    segments = segments_of(headers, base, page_size())
    for span in Object("", "", base, headers, segments).spans():
        low, high = Region(span[0].start, span[-1].end, 0).huge(pmd)
        if low < high and any(segment.code for segment in span):
            return True
    return False
