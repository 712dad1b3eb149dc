"""Memory locks (mlock(2)): those that this package made, and those of the host, which it keeps."""

from __future__ import annotations

import os
from _struct import Struct

from page_primer import _core
from page_primer._lean import ours, suppress
from page_primer.apply.swap import Key, key_of
from page_primer.backing.pieces import reason_of
from page_primer.budget import disjoint
from page_primer.elf.objects import Object, Range, Region
from page_primer.kernel import memlock, smaps
from page_primer.kernel.smaps import Mapping, overlapping
from page_primer.mlock_plan import Lock
from page_primer.survey import Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence


# Address, bytes, flags, and whose memory it is (_owner): so packed, what hundreds of locks take of
# memory, in this process and in each child that looks at them, is a few pages.
_FORM = Struct("4Q")


class Mlocks:
    """The locks of this process. A fork does not inherit them."""

    def __init__(self) -> None:
        self._made = bytearray()
        self._refused = bytearray()
        self.refusal: str | None = None  # why the first of those that were refused was
        self.withheld = 0  # bytes that were not asked for, to leave memory to others
        self._host: list[Range] = []  # made by the host, not by us
        # Of those, what is not locked since it was refused over a swap.
        self._owed: list[Range] = []
        self._process = (0, 0)  # whose they are: PID, forks since the first
        self._whole = True  # whether that one locked all that its parent had locked

    @property
    def made(self) -> Iterator[Range]:
        """What is locked."""
        for start, length, _, _ in _FORM.iter_unpack(self._made):
            yield Range(start, start + length)

    def forget(self) -> None:
        """In a forked child, none is in force but those that it made."""
        if not self.in_force:
            self._made = bytearray()
            self._forget_host()

    def note_host(self, found: Survey) -> None:
        """What the host has locked of its own, it keeps: over the swap, and over restore()."""
        self.release_for_host(found.mappings)

        def is_there(start: int, length: int) -> bool:
            return any(m.is_locked for m in overlapping(found.mappings, start, start + length))

        # Of what was unloaded meanwhile, or unloaded and loaded again, the lock is gone.
        self._keep(lambda start, length, _: is_there(start, length))
        known = disjoint([*self._host, *self.made])
        for obj in found.objects:
            whole = Range(obj.start, obj.end)
            for mapping in overlapping(found.mappings, obj.start, obj.end):
                if not mapping.is_locked:
                    continue
                part = whole.clip(Range(mapping.start, mapping.end))
                if not any(part.overlaps(other) for other in known):
                    self._host.append(part)

    def release_for_host(self, mappings: Sequence[Mapping] | None = None) -> None:
        """What the host has unlocked since is not to be locked again: munlock(2) takes our lock and
        its own."""
        if not self._host:
            return
        if mappings is None:
            with suppress(OSError):  # /proc is hidden: as it was
                mappings = smaps.read_own()
        if not mappings:
            return
        still = [
            part
            for where in self._host
            for mapping in overlapping(mappings, where.start, where.end)
            if mapping.is_locked and (part := where.clip(Range(mapping.start, mapping.end))).length
        ]
        owed = [where for where in self._host if any(where.overlaps(o) for o in self._owed)]
        self._host = disjoint([*still, *owed])

    def _forget_host(self) -> None:
        self._host.clear()
        self._owed.clear()

    def _keep(self, wanted: Callable[[int, int, int], bool]) -> None:
        """Forget the locks of which that is not true: of address, bytes, and whose memory."""
        made = _FORM.iter_unpack(self._made)
        kept = (_FORM.pack(*one) for one in made if wanted(one[0], one[1], one[3]))
        self._made = bytearray().join(kept)

    @property
    def sizes(self) -> tuple[int, int]:
        """Bytes that are locked, and bytes that were refused."""
        made, refused = (
            sum(length for _, length, _, _ in _FORM.iter_unpack(of))
            for of in (self._made, self._refused)
        )
        return made, refused

    def make(self, wanted: Iterable[Lock]) -> None:
        """Lock what is not locked yet; what the limit does not allow beside the host's part of it,
        or the kernel refuses, is noted."""
        known = {one[:2] for one in _FORM.iter_unpack(self._made)}
        numbers = ((w.start, w.end - w.start, _flags(w), _owner(key_of(w.object))) for w in wanted)
        self._make(one for one in numbers if one[:2] not in known)

    def _make(self, wanted: Iterable[tuple[int, ...]]) -> None:
        self._refused = bytearray()
        self.refusal = None
        room, asked = None, False
        for start, length, flags, owner in wanted:
            if not asked:
                room, asked = memlock.room(), True
            whole, packed = Range(start, start + length), _FORM.pack(start, length, flags, owner)
            cost = length - sum(whole.clip(part).length for part in self._host)
            why = memlock.OVER if room is not None and cost > room else None
            if why is None:
                self._made += packed  # before: an exception of the host's may come at any moment
                try:
                    _core.lock(start, length, flags)
                except ours(OSError) as error:
                    why = reason_of(error)
                    del self._made[-_FORM.size :]
            if why is not None:
                self._refused += packed
                self.refusal = self.refusal or why
            elif room is not None:
                room -= cost
        self._process = _this()

    @property
    def in_force(self) -> bool:
        """Whether what was locked is: in a forked child it is not, before it is locked again."""
        return self._process == _this()

    def make_again(self) -> bool:
        """In a forked child: lock what the parent had locked, once. Returns whether that is all of
        it."""
        if not self.in_force:
            self._forget_host()
            self._whole = self._lock_plain() or self._lock_each()
            self._process = _this()
        return self._whole

    def _lock_plain(self) -> bool:
        if self._made and not self._refused:
            room = memlock.room()
            if room is None or self.sizes[0] <= room:
                done = []
                with suppress(OSError):
                    for address, length, flags, _ in _FORM.iter_unpack(self._made):
                        _core.lock(address, length, flags)
                        done.append((address, length))
                    return True
                for address, length in done:  # to be counted once, one by one
                    with suppress(OSError):
                        _core.unlock(address, length)
        return False

    def _lock_each(self) -> bool:
        before, self._made = self._made, bytearray()
        self._make(_FORM.iter_unpack(before + self._refused))
        return {*_FORM.iter_unpack(before)} == {*_FORM.iter_unpack(self._made)}

    def relock_for_host(self, regions: Iterable[Region]) -> None:
        """Mapping something else over a range loses its lock. Whole regions: a lock of a part would
        split the mapping, and the huge page at its border."""
        for region in regions:
            if any(region.overlaps(other) for other in self._host):
                self._lock_for_host(Range(region.start, region.end))

    def put_back(self, obj: Object) -> None:
        """After an object was put back, whose mappings are new: the host's locks on it, and none of
        ours on what had stayed on its file."""
        whole = Range(obj.start, obj.end)
        for where in self.made:
            if where.overlaps(whole):
                with suppress(OSError):
                    _core.unlock(where.start, where.length)
        self._keep(lambda start, length, _: not Range(start, start + length).overlaps(whole))
        for where in self._host:
            if where.overlaps(whole):
                self._lock_for_host(where)

    def _lock_for_host(self, where: Range) -> None:
        self._owed = [other for other in self._owed if not other.overlaps(where)]
        if not _lock(where):
            self._owed.append(where)

    def unlock(self, loaded: Collection[Key]) -> None:
        """Unlock what was locked here of objects that are still loaded: where another was, there
        may be the host's memory by now, with a lock of its own."""
        owners = {_owner(key) for key in loaded}
        for start, length, _, owner in _FORM.iter_unpack(self._made):
            if owner in owners:
                with suppress(OSError):
                    _core.unlock(start, length)
        self._made, self._refused = bytearray(), bytearray()
        self.refusal = None
        self.withheld = 0

    def give_back_to_host(self) -> None:
        """Lock what the host had locked, and forget about it."""
        for where in self._host:
            _lock(where)
        self._forget_host()


def _this() -> tuple[int, int]:
    return os.getpid(), _core.forks()


def _owner(key: Key) -> int:
    return hash(key) & (1 << 64) - 1


def _flags(lock: Lock) -> int:
    return _core.MLOCK_ONFAULT if lock.on_fault else 0


def _lock(where: Range) -> bool:
    with suppress(OSError):
        _core.lock(where.start, where.length)
        return True
    return False
