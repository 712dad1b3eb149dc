"""Carry a plan out, remember what is primed, undo it, and measure what the kernel made of it."""

from __future__ import annotations

import errno
import os
import time

from page_primer import _core, backing, in_place, plan, smaps, survey
from page_primer.measure import measure
from page_primer.memory import Memory
from page_primer.move import (
    NO_BACKING,
    Key,
    NotMoved,
    Primed,
    carry_out,
    fault_in,
    key_of,
    put_back,
)
from page_primer.options import IN_PLACE, Options
from page_primer.plan import Left, Lock, Move, Range, Region
from page_primer.record import replace
from page_primer.report import ObjectReport, Report
from page_primer.smaps import Mapping, overlapping
from page_primer.suppress import suppress
from page_primer.survey import Object, Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence
    from threading import RLock, get_ident

    from page_primer.perfmap import PerfMap
else:
    from _thread import RLock, get_ident  # threading takes 2 ms to import


class Process:
    """What page-primer has done to this process. A forked child inherits it, but for the locks."""

    def __init__(self) -> None:
        self.pid = 0
        self.loads = (0, 0)
        self.options: Options | None = None
        self.objects: tuple[Object, ...] = ()
        self.pmd = 0
        self.primed: dict[Key, Primed] = {}
        self.mapped: dict[Key, tuple[str, int]] = {}  # device, inode, as in smaps
        # What is on huge pages where it is: the mappings, and the backing for the report.
        self.in_place: dict[Key, tuple[tuple[Region, ...], str]] = {}
        self.aligned: set[Key] = set()  # objects that need no copy, if their pages were huge
        self.left: dict[Key, list[Left]] = {}
        self.notes: dict[Key, tuple[str, ...]] = {}
        self.locked: dict[Range, Lock] = {}
        self.refused: dict[Range, tuple[Lock, OSError]] = {}
        self.withheld: list[Lock] = []  # for want of memory
        self.memory: Memory | None = None  # what was to be had when that was decided
        self.perf_map: PerfMap | None = None
        self.hosts_locks: list[Range] = []  # made by others than us
        self.huge = 0  # bytes of moved regions on huge pages, when last measured
        self.report: Report | None = None
        # A call is under way; another in the same thread is a signal handler's.
        self.busy = False

    def prime(self, options: Options) -> Report:
        """Bring the process to the primed state; see page_primer.prime()."""
        began = time.perf_counter()
        child = self.pid != os.getpid()
        self.pid = os.getpid()
        last = self.report
        if last is not None and self.options == options and self.loads == _core.loads():
            if child and not self._inherit():
                last = self._measure((), smaps.read_smaps(), began)
            elif child or last.moved:
                last = replace(last, pid=self.pid, moved=(), milliseconds=_since(began))
            self.report = last  # from now on the same, which costs a frequent caller least
            return last
        self.report = None  # should this not come to its end
        held = self._held()  # by the parent too, so that locking it here takes no memory
        if child:
            self.locked.clear()
            self.hosts_locks.clear()
        moved = self._move_new(options, held)
        mappings = self._lock_and_look(moved, options, held)
        # Of the first backing that could be prepared, smaps was not asked yet.
        if self._move_small_again(moved, mappings, options):
            mappings = self._lock_and_look(moved, options, held)
            if self._take_back_small(moved, mappings):
                mappings = self._lock_and_look(moved, options, held)
        for key in moved:
            start = self.primed[key].regions[0].start
            for mapping in overlapping(mappings, start, start + 1):
                self.mapped[key] = mapping.device, mapping.inode
        self._write_perf_map()
        self.report = self._measure(moved, mappings, began)
        return self.report

    def _inherit(self) -> bool:
        """In a forked child: lock what the parent had locked, which a fork does not inherit, and
        have the moved code mapped. Returns whether everything is as it was in the parent, so that
        the parent's measurements hold."""
        before = set(self.locked), self.huge, self._perf_map_outcome()
        self.lock_in_child()
        for regions in self._regions():
            fault_in(regions)
        self._write_perf_map()
        self.huge = self._huge(smaps.starting_at(self._starts()))
        return before == (set(self.locked), self.huge, self._perf_map_outcome())

    def lock_in_child(self) -> Report:
        """In a forked child: lock what the parent had locked, and nothing else."""
        wanted = [*self.locked.values(), *(lock for lock, _ in self.refused.values())]
        self.locked.clear()
        self._lock(wanted)
        return self.report or Report(os.getpid(), None)

    def _write_perf_map(self) -> None:
        if self.options is not None and self.options.perf_map:
            from page_primer.perfmap import PerfMap

            self.perf_map = self.perf_map or PerfMap()
            self.perf_map.update(self.primed)

    def _perf_map_outcome(self) -> str | None:
        return self.perf_map.outcome if self.perf_map else None

    def restore(self) -> Report:
        """Put everything back; see page_primer.restore()."""
        began = time.perf_counter()
        for start, end in self.locked:
            with suppress(OSError):
                _core.unlock(start, end - start)
        self.locked.clear()
        self.refused.clear()
        self.withheld.clear()
        for key, primed in list(self.primed.items()):
            try:
                put_back(primed)
            except OSError as error:
                note = f"not put back: {backing.reason_of(error)}"
                if note not in primed.notes:
                    self.primed[key] = replace(primed, notes=(*primed.notes, note))
            else:
                self._forget(key)
        for start, end in self.hosts_locks:
            with suppress(OSError):
                _core.lock(start, end - start)
        self.hosts_locks.clear()
        self.left.clear()
        self.notes.clear()
        self.in_place.clear()  # nothing was changed that could be put back
        self.options = None
        self.report = self._measure((), smaps.read_smaps(), began)
        return self.report

    # -------------------------------------------------------------------------------- moving ---

    def _move_new(self, options: Options, held: Sequence[Range]) -> dict[Key, Move]:
        """Survey the process and move what can be moved and is not yet; returns what was."""
        known = len(self.primed)
        found = self._as_it_was_before_us(survey.take())
        if len(self.primed) < known:  # what was forgotten may have left something mapped
            found = self._as_it_was_before_us(survey.take())
        self._note_hosts_locks(found)
        used = sum(p.bytes for p in self.primed.values() if not p.object.interpreter)
        planned = plan.make(found, options, used, held)
        self.memory = found.memory
        self.left, self.notes = {}, {}
        for left in planned.left:
            self.left.setdefault(key_of(left.object), []).append(left)
        for key, primed in self.primed.items():
            self.left[key] = plan.explain(primed.object, primed.regions, found.pmd_size or self.pmd)
        self.objects, self.pmd = found.objects, found.pmd_size or self.pmd
        self.options, self.loads = options, found.loads
        self._note_in_place(found, planned)
        copies = self._bring_in_place(planned.moves, options)
        places = backing.directories(options) if copies else []
        moved = {
            key_of(move.object): move
            for move in copies
            if self._move(move, options, places, verified=False)
        }
        # Better than nothing: a part of what a copy would have covered.
        if options.backing == "auto":
            unmoved = [move for move in copies if key_of(move.object) not in moved]
            self._try_in_place([move for move in unmoved if move.in_place], partly=True)
        return moved

    def _note_in_place(self, found: Survey, planned: plan.Plan) -> None:
        """Keep book of what needs no copy."""
        loaded = {key_of(obj) for obj in found.objects}
        self.in_place = {key: kept for key, kept in self.in_place.items() if key in loaded}
        for move in planned.already:
            self.in_place.setdefault(key_of(move.object), (move.in_place, in_place.ALREADY))
        whole = {key_of(m.object) for m in (*planned.moves, *planned.already) if m.aligned}
        self.aligned = (self.aligned | whole) & loaded
        for key, (regions, _) in self.in_place.items():
            obj = next(obj for obj in found.objects if key_of(obj) == key)
            self.left[key] = plan.explain(obj, regions, self.pmd)

    def _bring_in_place(self, moves: Sequence[Move], options: Options) -> list[Move]:
        """Have huge pages where the loader mapped the code, as the options say: of objects of which
        that covers as much as a copy, or of all. Returns the moves that are still to be made."""
        only = options.backing == IN_PLACE
        if not only and options.backing != "auto":
            return [move for move in moves if move.image]
        failed = self._try_in_place([m for m in moves if m.aligned or only], partly=only)
        for move in failed:
            self._leave(move.object, move.object.problem or NO_BACKING, move.notes)
        if only:
            return []
        again = {key_of(move.object): move for move in failed}
        rest = [again.get(key_of(m.object), m) for m in moves]
        return [m for m in rest if m.image and key_of(m.object) not in self.in_place]

    def _try_in_place(self, moves: Sequence[Move], *, partly: bool) -> list[Move]:
        """Returns the moves that did not come out huge throughout, or, if a part is good enough,
        not at all; with what came of it in their notes."""
        outcomes = in_place.bring_in([move.in_place for move in moves], self.pmd) if moves else []
        failed = []
        for move, outcome in zip(moves, outcomes, strict=True):
            key = key_of(move.object)
            if outcome.complete or (partly and outcome.huge):
                self.in_place[key] = move.in_place, outcome.backing
                self.left[key] = plan.explain(move.object, move.in_place, self.pmd)
            else:
                note = f"in place: {outcome.huge} of {outcome.wanted} bytes huge"
                failed.append(replace(move, notes=(*move.notes, note)))
        return failed

    def _survey_again(self, moved: dict[Key, Move]) -> Sequence[Mapping]:
        """Writing an image loads modules, which are to be locked as well: find what was loaded
        since the survey, and strike from `moved` what was unloaded. Returns the mappings, as maps
        has them."""
        known = [obj for obj in self.objects if key_of(obj) not in self.primed]
        found = self._as_it_was_before_us(survey.take(smaps.read_maps, known), moved)
        self.objects, self.loads = found.objects, found.loads
        for key in moved.keys() - self.primed.keys():
            del moved[key]
        return found.mappings

    def _move(
        self, move: Move, options: Options, places: Sequence[backing.Place], *, verified: bool
    ) -> bool:
        """Move one object, or note why it is left. Returns whether it was moved."""
        key = key_of(move.object)
        try:
            carry_out(move, self.pmd, options, places, self.primed, verified=verified)
        except NotMoved as why:
            self._leave(move.object, str(why), why.notes)
            return False
        except Exception as error:  # whatever it is, it concerns this object alone
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError):
                text = backing.reason_of(error)
            self._undo(key)
            self._leave(move.object, text, ())
            return False
        self.left[key] = plan.explain(move.object, self.primed[key].regions, self.pmd)
        return True

    def _move_small_again(
        self, moved: dict[Key, Move], mappings: Sequence[Mapping], options: Options
    ) -> bool:
        """Put back what is not on huge pages throughout, and move it to the first backing that
        smaps confirms. Returns whether there was any."""
        small = [
            key for key in moved if self._huge_of(key, mappings) < self.primed[key].prepared.wanted
        ]
        places = backing.directories(options) if small else []
        for key in small:
            with suppress(OSError):
                self._put_back(key)
                if not self._move(moved[key], options, places, verified=True):
                    del moved[key]
        return bool(small)

    def _take_back_small(self, moved: dict[Key, Move], mappings: Sequence[Mapping]) -> bool:
        """Put back what was huge where it was prepared, but is not where it was moved to: that is
        not what was asked for. Returns whether there was any."""
        small = [key for key in moved if not self._huge_of(key, mappings)]
        for key in small:
            with suppress(OSError):
                primed = self.primed[key]
                self._put_back(key)
                reason = f"no huge pages after the swap ({primed.prepared.where})"
                self._leave(primed.object, reason, primed.notes)
                del moved[key]
        return bool(small)

    def _put_back(self, key: Key) -> None:
        """Put one object back, with the host's locks on it. Raises OSError when that fails."""
        primed = self.primed[key]
        put_back(primed)
        self._forget(key)
        start, end = primed.object.start, primed.object.end
        for low, high in [where for where in self.locked if where[0] < end and start < where[1]]:
            del self.locked[low, high]
        for low, high in self.hosts_locks:
            if low < end and start < high:
                with suppress(OSError):
                    _core.lock(low, high - low)

    def _undo(self, key: Key) -> None:
        """After an unforeseen failure: what was moved is put back, if it was."""
        if key in self.primed:
            with suppress(OSError):
                self._put_back(key)

    def _regions(self) -> Iterator[Sequence[Region]]:
        """What is to be on huge pages, of each object."""
        for primed in self.primed.values():
            yield primed.regions
        for regions, _ in self.in_place.values():
            yield regions

    def _starts(self) -> set[int]:
        return {region.start for regions in self._regions() for region in regions}

    def _huge_of(self, key: Key, mappings: Iterable[Mapping]) -> int:
        """Bytes of a moved object's regions that are on huge pages."""
        starts = {region.start for region in self.primed[key].regions}
        return sum(mapping.huge for mapping in mappings if mapping.start in starts)

    def _huge(self, mappings: Iterable[Mapping]) -> int:
        starts = self._starts()
        return sum(mapping.huge for mapping in mappings if mapping.start in starts)

    def _as_it_was_before_us(self, found: Survey, moved: Collection[Key] = ()) -> Survey:
        """The survey with the objects that we moved as they were surveyed then: what can be seen of
        them now is what we made of them. What was unloaded since, or unloaded and loaded again at
        the same address, is forgotten."""
        loaded = {key_of(obj): obj for obj in found.objects}
        for key, primed in list(self.primed.items()):
            start = primed.regions[0].start
            here = next(overlapping(found.mappings, start, start + 1), None)
            if key not in loaded or here is None:
                self._forget(key)
            elif key not in self.mapped:  # just moved, or interrupted: then moved or not
                if key in moved or loaded[key].problem == survey.REMAPPED:
                    self.mapped[key] = here.device, here.inode
                else:
                    self._forget(key)
            elif self.mapped[key] != (here.device, here.inode):
                self._forget(key)
        objects = tuple(
            replace(self.primed[key_of(obj)].object, problem=survey.REMAPPED)
            if key_of(obj) in self.primed
            else obj
            for obj in found.objects
        )
        return replace(found, objects=objects)

    def _forget(self, key: Key) -> None:
        self.mapped.pop(key, None)
        primed = self.primed.pop(key)
        primed.posts.take_down()
        if primed.prepared.image is not None:
            primed.prepared.image.close()

    def _leave(self, obj: Object, reason: str, notes: tuple[str, ...]) -> None:
        self.notes[key_of(obj)] = notes
        self.left[key_of(obj)] = [
            Left(obj, s.start, s.end, s.kind, plan.WRITABLE if s.writable else reason)
            for s in obj.segments
        ]

    # ------------------------------------------------------------------------------- locking ---

    def _note_hosts_locks(self, found: Survey) -> None:
        """What the host has locked of its own, it keeps: over the swap, and over restore()."""
        known = [*self.hosts_locks, *self.locked]
        for obj in found.objects:
            for mapping in overlapping(found.mappings, obj.start, obj.end):
                start, end = max(mapping.start, obj.start), min(mapping.end, obj.end)
                if mapping.is_locked and not any(a < end and start < b for a, b in known):
                    self.hosts_locks.append((start, end))

    def _lock_and_look(
        self, moved: dict[Key, Move], options: Options, held: Sequence[Range]
    ) -> Sequence[Mapping]:
        """Lock what is there after the moves, as far as memory allows beside them, and read what
        came of both. What was `held` before takes no more memory."""
        loaded = _core.loads() != self.loads
        mappings = self._survey_again(moved) if loaded else smaps.read_maps()
        self._lock_again_for_host(moved)
        wanted = plan.locks(self.objects, mappings, options)
        room = plan.memory_room(self.memory, options, held)
        objects = [self.primed[key].object for key in moved]
        room -= sum(plan.size_of(obj) for obj in objects)
        paid = [*held, *((s.start, s.end) for obj in objects for s in obj.segments)]
        allowed, self.withheld = plan.affordable(wanted, room, paid)
        self._lock(allowed)
        return smaps.read_smaps()

    def _lock_again_for_host(self, moved: Iterable[Key]) -> None:
        """Mapping something else over a range loses its lock. Whole regions: a lock of a part would
        split the mapping, and the huge page at its border."""
        for region in [region for key in moved for region in self.primed[key].regions]:
            if any(low < region.end and region.start < high for low, high in self.hosts_locks):
                with suppress(OSError):
                    _core.lock(region.start, region.end - region.start)

    def _held(self) -> list[Range]:
        """The ranges that we have copied or locked: they take no more memory."""
        moved = [(r.start, r.end) for primed in self.primed.values() for r in primed.regions]
        return [*moved, *self.locked]

    def _lock(self, wanted: Iterable[Lock]) -> None:
        self.refused.clear()
        for lock in wanted:
            where = (lock.start, lock.end)
            if where in self.locked:
                continue
            try:
                flags = _core.MLOCK_ONFAULT if lock.on_fault else 0
                _core.lock(lock.start, lock.end - lock.start, flags)
            except OSError as error:
                self.refused[where] = lock, error
            else:
                self.locked[where] = lock

    # ----------------------------------------------------------------------------- measuring ---

    def _measure(self, moved: Iterable[Key], mappings: Sequence[Mapping], began: float) -> Report:
        self.huge = self._huge(mappings)
        _, refusal = next(iter(self.refused.values()), (None, None))
        over = refusal is not None and refusal.errno in (errno.ENOMEM, errno.EPERM, errno.EAGAIN)
        refused = sum(end - start for start, end in self.refused)
        withheld = sum(lock.end - lock.start for lock in self.withheld)
        explicit = self.options.explicit if self.options else frozenset()
        return Report(
            pid=self.pid,
            reason=None,
            objects=tuple(self._measure_object(obj, mappings) for obj in self.objects),
            moved=tuple(self.primed[key].object.path for key in moved),
            lock_wanted_bytes=refused + withheld + sum(end - start for start, end in self.locked),
            lock_refused_bytes=refused,
            lock_withheld_bytes=withheld,
            lock_refusal=backing.reason_of(refusal) if refusal else None,
            lock_limit=_core.limit(_core.RLIMIT_MEMLOCK) if over else None,
            perf_map=self._perf_map_outcome(),
            memory=self.memory,
            memory_share=self.options.memory_share if self.options else None,
            warn=tuple(sorted(explicit & {"remap", "mlock", "backing"})),
            milliseconds=_since(began),
            threads=_core.threads(),
        )

    def _measure_object(self, obj: Object, mappings: Sequence[Mapping]) -> ObjectReport:
        here = list(overlapping(mappings, obj.start, obj.end))
        primed = self.primed.get(key_of(obj))
        segments = measure(obj.segments, here, self.pmd, self.left.get(key_of(obj), ()))
        code = [segment for segment in segments if segment.kind == "code"]
        notes = primed.notes if primed else self.notes.get(key_of(obj), ())
        _, kept = self.in_place.get(key_of(obj), (None, None))
        return ObjectReport(
            path=obj.path,
            interpreter=obj.interpreter,
            backing=primed.prepared.backing if primed else kept,
            where=primed.prepared.where if primed else None,
            code_bytes=sum(segment.bytes for segment in code),
            code_huge_bytes=sum(segment.huge_bytes for segment in code),
            huge_bytes=sum(segment.huge_bytes for segment in segments),
            locked_bytes=sum(segment.locked_bytes for segment in segments),
            copied_bytes=primed.bytes if primed else 0,
            written_bytes=primed.prepared.written if primed else 0,
            segments=segments,
            notes=notes,
            aligned=key_of(obj) in self.aligned,
        )


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


process = Process()

# One prime() at a time; and a fork waits for one that is under way in another thread, or the child
# would inherit a half-kept book and a lock that nobody holds. Reentrant for signal handlers, which
# run in the midst of it and may fork.
lock = RLock()
_holders: set[int] = set()  # threads that fork, and hold the lock for it


def _before_fork() -> None:
    _holders.discard(get_ident())
    lock.acquire()  # a signal handler may raise here, and the fork goes on all the same
    _holders.add(get_ident())


def _after_fork_in_parent() -> None:
    if get_ident() in _holders:
        _holders.discard(get_ident())
        lock.release()


def _after_fork_in_child() -> None:
    process.pid = 0  # in another PID namespace a child may have its parent's number
    if get_ident() in _holders:
        _holders.discard(get_ident())
        lock.release()
    else:  # forked by C code that runs no hook before, or the wait was interrupted
        lock._at_fork_reinit()  # type: ignore[attr-defined]


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
