"""Memory locks (mlock(2)): those that this package made, and those of the host, which it keeps."""

from __future__ import annotations

from page_primer import _core
from page_primer._lean import suppress
from page_primer.backing.pieces import reason_of
from page_primer.elf.objects import Object, Range, Region
from page_primer.kernel import memlock
from page_primer.kernel.smaps import overlapping
from page_primer.mlock_plan import Lock
from page_primer.survey import Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable


class Mlocks:
    """The locks of this process. A fork does not inherit them."""

    def __init__(self) -> None:
        self.made: dict[Range, Lock] = {}
        self.refused: dict[Range, tuple[Lock, str]] = {}  # with the reason
        self.withheld: list[Lock] = []  # not asked for, to leave memory to others
        self._host: list[Range] = []  # made by the host, not by us

    def forget(self) -> None:
        """In a forked child, none is in force."""
        self.made.clear()
        self._host.clear()

    def note_host(self, found: Survey) -> None:
        """What the host has locked of its own, it keeps: over the swap, and over restore()."""
        known = [*self._host, *self.made]
        for obj in found.objects:
            whole = Range(obj.start, obj.end)
            for mapping in overlapping(found.mappings, obj.start, obj.end):
                part = whole.clip(Range(mapping.start, mapping.end))
                if mapping.is_locked and not any(part.overlaps(other) for other in known):
                    self._host.append(part)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes that are locked, and bytes that were refused."""
        made, refused = (sum(one.length for one in of) for of in (self.made, self.refused))
        return made, refused

    @property
    def refusal(self) -> str | None:
        """Why the first of those that were refused was."""
        return next((reason for _, reason in self.refused.values()), None)

    def make(self, wanted: Iterable[Lock]) -> None:
        """Lock what is not locked yet; what the limit does not allow beside the host's part of it,
        or the kernel refuses, is noted."""
        self.refused.clear()
        wanted = [lock for lock in wanted if lock.range not in self.made]
        room = memlock.room() if wanted else None
        for lock in wanted:
            cost = lock.range.length - sum(lock.range.clip(part).length for part in self._host)
            if room is not None and cost > room:
                self.refused[lock.range] = lock, memlock.OVER
                continue
            try:
                flags = _core.MLOCK_ONFAULT if lock.on_fault else 0
                _core.lock(lock.start, lock.range.length, flags)
            except OSError as error:
                self.refused[lock.range] = lock, reason_of(error)
            else:
                self.made[lock.range] = lock
                room = None if room is None else room - cost

    def make_again(self) -> None:
        """In a forked child: lock what the parent had locked."""
        wanted = [*self.made.values(), *(lock for lock, _ in self.refused.values())]
        self.made.clear()
        self.make(wanted)

    def relock_for_host(self, regions: Iterable[Region]) -> None:
        """Mapping something else over a range loses its lock. Whole regions: a lock of a part would
        split the mapping, and the huge page at its border."""
        for region in regions:
            if any(region.overlaps(other) for other in self._host):
                _lock(region)

    def put_back(self, obj: Object) -> None:
        """After an object was put back, whose mappings are new: the host's locks on it, and none of
        ours on what had stayed on its file."""
        whole = Range(obj.start, obj.end)
        for where in [where for where in self.made if where.overlaps(whole)]:
            with suppress(OSError):
                _core.unlock(where.start, where.length)
            del self.made[where]
        for where in self._host:
            if where.overlaps(whole):
                _lock(where)

    def unlock(self) -> None:
        """Unlock what was locked here."""
        for start, end in self.made:
            with suppress(OSError):
                _core.unlock(start, end - start)
        self.made.clear()
        self.refused.clear()
        self.withheld.clear()

    def give_back_to_host(self) -> None:
        """Lock what the host had locked, and forget about it."""
        for where in self._host:
            _lock(where)
        self._host.clear()


def _lock(where: Range) -> None:
    with suppress(OSError):
        _core.lock(where.start, where.length)
