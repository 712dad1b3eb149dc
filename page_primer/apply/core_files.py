"""Core files of a process whose fixed program (ET_EXEC) was moved to an image: it is in them.

The kernel leaves mappings of files out of core files, but for the first page of a mapping that
begins with its file. By that page tools find the program: it has the program headers, to which
AT_PHDR points, and the build-id. In an image something else is at the file's beginning, and
elfutils (hence systemd-coredump) finds neither the program nor, since the way to the loader's list
leads through its headers, the libraries. Libraries that were moved are found by that list.

So the kernel is made to write the image's mappings out whole: elfutils then takes the program from
the core file, whatever has become of the image since. A core file grows by their size, the process
by a page for each.
"""

from __future__ import annotations

from page_primer import _core
from page_primer._lean import suppress
from page_primer.kernel.thp import page_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.backing.pieces import Prepared
    from page_primer.elf.objects import Object


def include(obj: Object, prepared: Prepared) -> None:
    """Have core files contain a program that was moved to an image, as far as that is possible
    without breaking up a huge page. Nothing depends on it, so the environment's refusals (a kernel
    that lets nobody write to /proc/self/mem) are not reported.

    Args:
        obj: the object.
        prepared: its replacement, in place, the image's file still open.
    """
    if not obj.fixed or prepared.image is None:  # of others the first page stays on the file
        return
    with suppress(OSError):
        for piece in prepared.pieces:
            region, huge = piece.region, piece.region.huge(prepared.pmd)
            if not huge.length or region.start < huge.start:
                _core.dump_page(region.start)
            elif huge.end < region.end:
                _core.dump_page(region.end - page_size())
            else:
                _core.dump_before(region.start, piece.protection, piece.fd, piece.offset)
