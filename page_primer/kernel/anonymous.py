"""Private anonymous memory of a process: whose it is, and how much of it is on huge pages."""

from __future__ import annotations

from page_primer._lean import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from page_primer.kernel.smaps import Mapping

ARENAS_NAME = "[anon:page-primer arenas]"  # in maps, what _heap.c names its regions
_HEAP = "[heap]"


class Use(Record):
    """Resident memory by what it serves, and how much of it is on huge pages; bytes."""

    arenas: int = 0
    arenas_huge: int = 0
    malloc: int = 0  # the brk heap
    malloc_huge: int = 0
    other: int = 0  # every other private anonymous mapping: large blocks, threads' heaps and stacks
    other_huge: int = 0

    @property
    def bytes(self) -> int:
        return self.arenas + self.malloc + self.other

    @property
    def huge(self) -> int:
        return self.arenas_huge + self.malloc_huge + self.other_huge

    def __str__(self) -> str:
        parts = (
            f"{name} {_mib(huge)} of {_mib(size)}"
            for name, huge, size in (
                ("arenas", self.arenas_huge, self.arenas),
                ("malloc", self.malloc_huge, self.malloc),
                ("other", self.other_huge, self.other),
            )
        )
        return f"{_mib(self.huge)} of {_mib(self.bytes)} MiB on huge pages ({', '.join(parts)})"


def use_of(mappings: Iterable[Mapping], is_arena: Callable[[Mapping], bool]) -> Use:
    """Add up what smaps has of private anonymous memory, the main thread's stack aside."""
    sums = dict.fromkeys(Use._fields, 0)
    for mapping in mappings:
        if not is_anonymous(mapping):
            continue
        kind = "malloc" if mapping.path == _HEAP else "arenas" if is_arena(mapping) else "other"
        sums[kind] += mapping.count("Rss")
        sums[f"{kind}_huge"] += mapping.count("AnonHugePages")
    return Use(**sums)


def is_anonymous(mapping: Mapping) -> bool:
    """Whether it is private, writable and nobody's file, and no stack that the kernel grows."""
    return (
        mapping.permissions == "rw-p"
        and not mapping.inode
        and (mapping.path in ("", _HEAP) or mapping.path.startswith("[anon:"))
    )


def named_by_us(mapping: Mapping) -> bool:
    """Whether a mapping, of any process, is of our arenas: kernels that know names tell."""
    return mapping.path == ARENAS_NAME


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f}"
