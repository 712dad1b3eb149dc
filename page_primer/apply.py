"""Carry a plan out, remember what is primed, undo it, and measure what the kernel made of it."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from page_primer import _core, backing, plan, smaps, survey
from page_primer.backing import Prepared, Refused
from page_primer.measure import measure
from page_primer.options import Options
from page_primer.plan import Left, Lock, Move, Region
from page_primer.report import ObjectReport, Report
from page_primer.smaps import Mapping, overlapping
from page_primer.survey import PF_X, Object, Survey

MODIFIED = "modified in memory"

Key = tuple[int, bytes]  # base and program headers: one loaded object
Range = tuple[int, int]  # addresses


@dataclass(frozen=True)
class Primed:
    """An object that was moved, with what is needed to measure it and to put it back."""

    object: Object
    regions: tuple[Region, ...]
    prepared: Prepared
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(region.end - region.start for region in self.regions)


@dataclass
class Process:
    """What page-primer has done to this process. A forked child inherits it, but for the locks."""

    pid: int = 0
    loads: tuple[int, int] = (0, 0)
    options: Options | None = None
    objects: tuple[Object, ...] = ()
    pmd: int = 0
    primed: dict[Key, Primed] = field(default_factory=dict)
    left: dict[Key, list[Left]] = field(default_factory=dict)
    notes: dict[Key, tuple[str, ...]] = field(default_factory=dict)
    locked: dict[Range, Lock] = field(default_factory=dict)
    refused: dict[Range, tuple[Lock, OSError]] = field(default_factory=dict)
    huge: int = 0  # bytes of moved regions on huge pages, when last measured
    report: Report | None = None
    busy: bool = False  # a call is under way; another in the same thread is a signal handler's

    def prime(self, options: Options) -> Report:
        """Bring the process to the primed state; see page_primer.prime()."""
        began = time.perf_counter()
        child = self.pid != os.getpid()
        self.pid = os.getpid()
        last = self.report
        if last is not None and self.options == options and self.loads == _core.loads():
            if child and not self._inherit():
                last = self.report = self._measure((), smaps.read_smaps(), began)
            return replace(last, pid=self.pid, moved=(), milliseconds=_since(began))
        if child:
            self.locked.clear()
        moved = self._move_new(options)
        self._lock(plan.locks(self.objects, smaps.read_maps(), options))
        mappings = smaps.read_smaps()
        if self._take_back_small(moved, mappings):
            mappings = smaps.read_smaps()
        self.report = self._measure(moved, mappings, began)
        return self.report

    def _inherit(self) -> bool:
        """In a forked child: lock what the parent had locked, which a fork does not inherit, and
        have the moved code mapped. Returns whether everything is as it was in the parent, so that
        the parent's measurements hold."""
        before = set(self.locked), self.huge
        wanted = [*self.locked.values(), *(lock for lock, _ in self.refused.values())]
        self.locked.clear()
        self._lock(wanted)
        for primed in self.primed.values():
            _fault_in(primed.regions)
        self.huge = self._huge(smaps.starting_at(self._starts()))
        return before == (set(self.locked), self.huge)

    def restore(self) -> Report:
        """Put everything back; see page_primer.restore()."""
        began = time.perf_counter()
        for start, end in self.locked:
            with contextlib.suppress(OSError):
                _core.unlock(start, end - start)
        self.locked.clear()
        self.refused.clear()
        failed: dict[Key, Primed] = {}
        for key, primed in self.primed.items():
            try:
                _put_back(primed)
            except OSError as error:
                note = f"not put back: {backing.reason_of(error)}"
                failed[key] = replace(primed, notes=(*primed.notes, note))
            else:
                if primed.prepared.image is not None:
                    primed.prepared.image.close()
        self.primed = failed
        self.left.clear()
        self.notes.clear()
        self.options = None
        self.report = self._measure((), smaps.read_smaps(), began)
        return self.report

    # -------------------------------------------------------------------------------- moving ---

    def _move_new(self, options: Options) -> list[Key]:
        """Survey the process and move what can be moved and is not yet; returns what was."""
        found = survey.take()
        self._forget_unloaded(found)
        used = sum(primed.bytes for primed in self.primed.values())
        planned = plan.make(found, options, used)
        self.left, self.notes = {}, {}
        for left in planned.left:
            self.left.setdefault(_key(left.object), []).append(left)
        moved = []
        places = backing.directories(options) if planned.moves else []
        for move in planned.moves:
            key = _key(move.object)
            try:
                primed = _carry_out(move, found.pmd_size, options, places)
            except NotMoved as why:
                self._leave(move.object, str(why), why.notes)
                continue
            except OSError as error:
                self._leave(move.object, backing.reason_of(error), ())
                continue
            self.primed[key] = primed
            self.left[key] = plan.explain(move.object, primed.regions, found.pmd_size)
            moved.append(key)
        if _core.loads() != found.loads:
            found = survey.take()  # writing an image loads modules, which are to be locked as well
        self.objects, self.pmd = found.objects, found.pmd_size
        self.options, self.loads = options, found.loads
        return moved

    def _take_back_small(self, moved: list[Key], mappings: Sequence[Mapping]) -> bool:
        """Put back what was huge where it was prepared, but is not where it was moved to: that is
        not what was asked for. Returns whether there was any."""
        taken_back = False
        for key in list(moved):
            primed = self.primed[key]
            starts = {region.start for region in primed.regions}
            if any(m.huge for m in mappings if m.start in starts):
                continue
            with contextlib.suppress(OSError):
                _put_back(primed)
                del self.primed[key]
                reason = f"no huge pages after the swap ({primed.prepared.where})"
                self._leave(primed.object, reason, primed.notes)
                moved.remove(key)
                taken_back = True
        return taken_back

    def _starts(self) -> set[int]:
        return {region.start for primed in self.primed.values() for region in primed.regions}

    def _huge(self, mappings: Iterable[Mapping]) -> int:
        starts = self._starts()
        return sum(mapping.huge for mapping in mappings if mapping.start in starts)

    def _forget_unloaded(self, found: Survey) -> None:
        """Drop what was unloaded since, or unloaded and loaded again at the same address."""
        there = {_key(obj) for obj in found.objects if obj.problem == survey.REMAPPED}
        for key in set(self.primed) - there:
            image = self.primed.pop(key).prepared.image
            if image is not None:
                image.close()

    def _leave(self, obj: Object, reason: str, notes: tuple[str, ...]) -> None:
        self.notes[_key(obj)] = notes
        self.left[_key(obj)] = [
            Left(obj, s.start, s.end, s.kind, plan.WRITABLE if s.writable else reason)
            for s in obj.segments
        ]

    # ------------------------------------------------------------------------------- locking ---

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

    def _measure(self, moved: Sequence[Key], mappings: Sequence[Mapping], began: float) -> Report:
        self.huge = self._huge(mappings)
        _, refusal = next(iter(self.refused.values()), (None, None))
        limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        over = refusal is not None and refusal.errno in (errno.ENOMEM, errno.EPERM, errno.EAGAIN)
        refused = sum(end - start for start, end in self.refused)
        explicit = self.options.explicit if self.options else frozenset()
        return Report(
            pid=self.pid,
            reason=None,
            objects=tuple(self._measure_object(obj, mappings) for obj in self.objects),
            moved=tuple(self.primed[key].object.path for key in moved),
            lock_wanted_bytes=refused + sum(end - start for start, end in self.locked),
            lock_refused_bytes=refused,
            lock_refusal=backing.reason_of(refusal) if refusal else None,
            lock_limit=limit if over and limit != resource.RLIM_INFINITY else None,
            warn=tuple(sorted(explicit & {"remap", "mlock", "backing"})),
            milliseconds=_since(began),
            threads=_core.threads(),
        )

    def _measure_object(self, obj: Object, mappings: Sequence[Mapping]) -> ObjectReport:
        here = list(overlapping(mappings, obj.start, obj.end))
        primed = self.primed.get(_key(obj))
        segments = measure(obj.segments, here, self.pmd, self.left.get(_key(obj), ()))
        code = [segment for segment in segments if segment.kind == "code"]
        return ObjectReport(
            path=obj.path,
            interpreter=obj.interpreter,
            backing=primed.prepared.backing if primed else None,
            where=primed.prepared.where if primed else None,
            code_bytes=sum(segment.bytes for segment in code),
            code_huge_bytes=sum(segment.huge_bytes for segment in code),
            huge_bytes=sum(segment.huge_bytes for segment in segments),
            locked_bytes=sum(segment.locked_bytes for segment in segments),
            copied_bytes=primed.bytes if primed else 0,
            written_bytes=primed.prepared.written if primed else 0,
            segments=segments,
            notes=primed.notes if primed else self.notes.get(_key(obj), ()),
        )


class NotMoved(Exception):
    """An object stays where it is; the message is the reason, `notes` tell the attempts."""

    def __init__(self, reason: str, notes: Iterable[str]) -> None:
        super().__init__(reason)
        self.notes = tuple(notes)


def _carry_out(move: Move, pmd: int, options: Options, places: Sequence[backing.Place]) -> Primed:
    """Move one object to the first backing that smaps confirms.

    Raises:
        NotMoved: no backing was good enough, or the swap was refused. The object is as it was.
    """
    notes: list[str] = []
    for fresh in (False, True):
        prepared = _choose(backing.attempts(move, pmd, options, places, fresh), notes)
        try:
            _swap_in(move.object, prepared)
        except _core.Error as error:
            # Pieces are replaced in order: those before the one that failed have been moved.
            wrong = error.step == "compare" and _is_wrong(prepared, move.object, error.start)
            prepared.discard(moved_below=error.start if error.step in ("replace", "undo") else 0)
            if error.step != "compare":
                raise NotMoved(f"swap failed at {backing.reason_of(error)}", notes) from error
            if fresh or not wrong:
                raise NotMoved(MODIFIED, notes) from error
            notes.append(f"{prepared.where}: wrong content, written again")
            continue
        except OSError as error:
            prepared.discard()
            raise NotMoved(backing.reason_of(error), notes) from error
        regions = tuple(piece.region for piece in prepared.pieces)
        _fault_in(regions)
        prepared.unmap(moved_below=regions[-1].end)
        if prepared.image is not None:
            prepared.image.close_file()
        return Primed(move.object, regions, prepared, tuple(notes))
    raise AssertionError("unreachable")


def _choose(attempts: Iterable[backing.Attempt], notes: list[str]) -> Prepared:
    """The first attempt that is huge throughout, or else the one that came nearest."""
    best: Prepared | None = None
    for attempt in attempts:
        if isinstance(attempt, Refused):
            notes.append(f"{attempt.where}: {attempt.reason}")
            continue
        if attempt.huge < attempt.wanted:
            notes.append(f"{attempt.where}: {attempt.huge} of {attempt.wanted} bytes huge")
        better = attempt.huge > (best.huge if best else 0)
        worse = best if better else attempt
        if worse is not None:
            worse.discard()
        if better:
            best = attempt
            if best.huge == best.wanted:
                break
    if best is None:
        raise NotMoved("no backing gave huge pages", notes)
    return best


def _swap_in(obj: Object, prepared: Prepared) -> None:
    original = os.open(obj.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        regions = [piece.region for piece in prepared.pieces]
        undo = [
            (start, end - start, protection, 0, original, offset)
            for start, end, protection, offset in _original_mappings(obj, regions)
        ]
        _core.swap(obj.base, obj.headers, [piece.swap for piece in prepared.pieces], undo)
    finally:
        os.close(original)


def _original_mappings(obj: Object, regions: Iterable[Region]) -> list[tuple[int, int, int, int]]:
    """(start, end, protection, file offset) of the loader's mappings that regions replace a part
    of. Whole ones: the kernel does not merge mappings of a file that was opened twice."""
    found = []
    for segment in obj.segments:
        hit = any(r.start < segment.file_end and segment.start < r.end for r in regions)
        if segment.writable or not hit:
            continue
        protection = _core.PROT_READ
        if segment.flags & PF_X:
            protection |= _core.PROT_EXEC | (backing.PROT_BTI if obj.bti else 0)
        found.append((segment.start, segment.file_end, protection, segment.offset))
    return found


def _put_back(primed: Primed) -> None:
    """Map an object's own file over what it was moved to. Raises OSError when that fails."""
    obj = primed.object
    fd = os.open(obj.path, os.O_RDONLY | os.O_CLOEXEC)
    areas: list[tuple[int, int]] = []
    between: Prepared | None = None
    try:
        if obj.source is None or survey.Source.of(obj.path, os.fstat(fd)) != obj.source:
            raise OSError(errno.ESTALE, survey.FILE_GONE)
        originals = []
        for start, end, protection, offset in _original_mappings(obj, primed.regions):
            source = _core.reserve(end - start, survey.page_size(), 0)
            _core.map(source, end - start, protection, _core.MAP_PRIVATE, fd, offset)
            areas.append((source, end - start))
            originals.append((start, end - start, protection, source, fd, offset))
        pieces = originals
        if primed.prepared.backing == "hugetlb":
            # Such a mapping can be cut at whole huge pages only (EINVAL): other memory takes its
            # place first, each region at once, and the file's mappings take that one's.
            between = backing.small(obj, primed.regions, primed.prepared.pmd)
            pieces = [piece.swap for piece in between.pieces] + originals
        _core.swap(obj.base, obj.headers, pieces, originals)
    finally:
        if between is not None:
            between.unmap()
        for source, length in areas:
            with contextlib.suppress(OSError):
                _core.unmap(source, length)
        os.close(fd)


def _is_wrong(prepared: Prepared, obj: Object, address: int) -> bool:
    """After a failed comparison: whether an image's content is to blame, rather than code that was
    modified in memory."""
    if prepared.image is None:
        return False
    piece = next(p for p in prepared.pieces if p.region.start <= address < p.region.end)
    with contextlib.suppress(OSError), open(obj.path, "rb") as original:
        for _, _, offset in backing.originals(Region(address, address + 1, 0), obj):
            original.seek(offset)
            there = piece.offset + address - piece.region.start
            return os.pread(prepared.image.fd, 1, there) != original.read(1)
    return False


def _fault_in(regions: Sequence[Region]) -> None:
    """Have the regions mapped, by huge entries where possible; smaps will tell."""
    for region in regions:
        with contextlib.suppress(OSError):
            _core.advise(region.start, region.end - region.start, _core.MADV_HUGEPAGE)
        with contextlib.suppress(OSError):
            _core.populate(region.start, region.end - region.start)


def _key(obj: Object) -> Key:
    return obj.base, obj.headers


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000


process = Process()

# One prime() at a time; and a fork waits for one that is under way in another thread, or the child
# would inherit a half-kept book and a lock that nobody holds. Reentrant for signal handlers, which
# run in the midst of it and may fork.
lock = threading.RLock()


def _release() -> None:
    with contextlib.suppress(RuntimeError):  # the acquisition was interrupted
        lock.release()


os.register_at_fork(before=lock.acquire, after_in_parent=_release, after_in_child=_release)
