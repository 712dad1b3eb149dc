"""Memory locks (mlock(2)): those that this package made, and those of the host, which it keeps."""

from __future__ import annotations

import os

from page_primer import _core
from page_primer._lean import suppress
from page_primer.apply.swap import Key, key_of
from page_primer.backing.pieces import reason_of
from page_primer.elf.objects import Object, Range, Region
from page_primer.kernel import memlock
from page_primer.kernel.smaps import overlapping
from page_primer.mlock_plan import Lock
from page_primer.survey import Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


class Mlocks:
    """The locks of this process. A fork does not inherit them."""

    def __init__(self) -> None:
        self.made: dict[Range, Lock] = {}
        self.refused: dict[Range, tuple[Lock, str]] = {}  # with the reason
        self.withheld: list[Lock] = []  # not asked for, to leave memory to others
        self._host: list[Range] = []  # made by the host, not by us
        # (address, bytes, flags) of all that is in `made`; empty: to be worked out again. A forked
        # child goes by these, for each record that it looks at is a page that it copies.
        self._plain: tuple[tuple[int, int, int], ...] = ()
        self._process = (0, 0)  # whose they are: PID, forks since the first
        self._whole = True  # whether that one locked all that its parent had locked

    def forget(self) -> None:
        """In a forked child, none is in force but those that it made."""
        if self._process == _this():
            return
        self._plain = ()
        self.made.clear()
        self._host.clear()

    def note_host(self, found: Survey) -> None:
        """What the host has locked of its own, it keeps: over the swap, and over restore()."""
        for where in [*self.made]:  # unloaded meanwhile, or loaded again: its lock went with it
            if not any(m.is_locked for m in overlapping(found.mappings, where.start, where.end)):
                del self.made[where]
                self._plain = ()
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
                _core.lock(lock.start, lock.range.length, _flags(lock))
            except OSError as error:
                self.refused[lock.range] = lock, reason_of(error)
            else:
                self.made[lock.range] = lock
                room = None if room is None else room - cost
        self._plain = tuple((m.start, m.range.length, _flags(m)) for m in self.made.values())
        self._process = _this()

    def make_again(self) -> bool:
        """In a forked child: lock what the parent had locked, once. Returns whether that is all of
        it."""
        if self._process != _this():
            self._whole = self._lock_plain() or self._lock_each()
            self._process = _this()
        return self._whole

    def _lock_plain(self) -> bool:
        if self._plain and not self.refused:
            room = memlock.room()
            if room is None or sum(length for _, length, _ in self._plain) <= room:
                with suppress(OSError):
                    for address, length, flags in self._plain:
                        _core.lock(address, length, flags)
                    return True
        return False

    def _lock_each(self) -> bool:
        before = set(self.made)
        wanted = [*self.made.values(), *(lock for lock, _ in self.refused.values())]
        self.made.clear()
        self.make(wanted)
        return before == set(self.made)

    def relock_for_host(self, regions: Iterable[Region]) -> None:
        """Mapping something else over a range loses its lock. Whole regions: a lock of a part would
        split the mapping, and the huge page at its border."""
        for region in regions:
            if any(region.overlaps(other) for other in self._host):
                _lock(region)

    def put_back(self, obj: Object) -> None:
        """After an object was put back, whose mappings are new: the host's locks on it, and none of
        ours on what had stayed on its file."""
        self._plain = ()
        whole = Range(obj.start, obj.end)
        for where in [where for where in self.made if where.overlaps(whole)]:
            with suppress(OSError):
                _core.unlock(where.start, where.length)
            del self.made[where]
        for where in self._host:
            if where.overlaps(whole):
                _lock(where)

    def unlock(self, loaded: Collection[Key]) -> None:
        """Unlock what was locked here of objects that are still loaded: where another was, there
        may be the host's memory by now, with a lock of its own."""
        for where, lock in self.made.items():
            if key_of(lock.object) in loaded:
                with suppress(OSError):
                    _core.unlock(where.start, where.length)
        self._plain = ()
        self.made.clear()
        self.refused.clear()
        self.withheld.clear()

    def give_back_to_host(self) -> None:
        """Lock what the host had locked, and forget about it."""
        for where in self._host:
            _lock(where)
        self._host.clear()


def _this() -> tuple[int, int]:
    return os.getpid(), _core.forks()


def _flags(lock: Lock) -> int:
    return _core.MLOCK_ONFAULT if lock.on_fault else 0


def _lock(where: Range) -> None:
    with suppress(OSError):
        _core.lock(where.start, where.length)
