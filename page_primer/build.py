"""`page-primer build`: write an interpreter's image for native load ahead of time.

For a container's image: at run time the store may be read-only, or be thrown away with every
container. The image is named by what the interpreter is, not by where it lies, so it fits wherever
the same file is installed.
"""

from __future__ import annotations

import os

from page_primer import elf, image, native, starts, store
from page_primer.starts import Refusal
from page_primer.survey import pmd_size

# Where the kernel has no huge pages to tell their size: the size that x86-64 and arm64 have.
_PMD_SIZE = 2 << 20


def build(python: str, directory: str) -> str:
    """Write the image and check it.

    Args:
        python: the interpreter: a path, or a name on PATH.
        directory: where the image goes; an absolute path.

    Returns:
        What to say: the path, and how to use it.

    Raises:
        Refusal: the interpreter cannot be laid out, or the directory not be written to.
    """
    if not os.path.isabs(directory):
        raise Refusal(f"DIR must be an absolute path, not {directory!r}")
    try:
        command = starts.resolve([python])
        path, library = starts.interpreter(command.program)
        what = library or path
        with open(what, "rb") as original:
            layout = native.lay_out(what, original.fileno(), pmd_size() or _PMD_SIZE)
            with store.Store(directory) as opened:
                written = opened.get(layout, fresh=True)
                try:
                    os.fsync(written.fd)
                    _check(written.path, layout, original.fileno())
                finally:
                    written.close()
    except image.CannotLayOut as error:
        raise Refusal(f"{what}: {error}") from error
    except store.Unusable as error:
        raise Refusal(f"{directory}: {error}") from error
    except OSError as error:
        raise Refusal(f"{error.filename or directory}: {error.strerror}") from error
    return f"{written.path}\nset PAGE_PRIMER_IMAGE_DIR={directory} where it is to be used"


def _check(path: str, layout: native.NativeLayout, original: int) -> None:
    """Read the image back as a stranger would: with another reader of ELF files."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    with open(path, "rb") as file:
        try:
            found = ELFFile(file)
            loads = [segment.header for segment in found.iter_segments("PT_LOAD")]
            names = {section.name for section in found.iter_sections()}
        except (ELFError, ValueError) as error:
            raise Refusal(f"{path}: not readable as an ELF file: {error}") from error
        code = [load for load in loads if load["p_flags"] & elf.PF_X]
        aligned = all(
            load["p_align"] == layout.pmd
            and load["p_offset"] % layout.pmd == load["p_vaddr"] % layout.pmd
            for load in code
        )
        if len(code) != 1 or not aligned or ".text" not in names:
            raise Refusal(f"{path}: not laid out as it should be")
        if not image.holds(layout, original, file.fileno()):
            raise Refusal(f"{path}: its content is not the original's")
