"""What became of each loaded object: moved, huge in place, or left alone and why.

An object is entered before it is moved, so that whatever interrupts the move can be undone.
"""

from __future__ import annotations

import os

from page_primer import _core, hot, plan, reasons
from page_primer._lean import Record, ours, replace, suppress
from page_primer.align.aligned import all_listed, is_aligned
from page_primer.apply.swap import Key, Primed, key_of, put_back
from page_primer.backing.in_place import ALREADY
from page_primer.backing.pieces import reason_of
from page_primer.elf.objects import Object, Range, Region
from page_primer.kernel.smaps import Mapping, overlapping, read_maps
from page_primer.kernel.thp import fault_in
from page_primer.outcome import ObjectReport, Segments
from page_primer.plan import Move, Plan, Remainder
from page_primer.reasons import Reason
from page_primer.survey import Survey
from page_primer.verify import measure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence


class InPlace(Record):
    """An object whose own mappings have huge pages."""

    mappings: tuple[Region, ...]
    backing: str  # in_place.ALREADY or options.IN_PLACE
    hot: tuple[Region, ...] = ()  # what of them is to be huge, if that is not all


class Registry:
    """The objects of this process. A forked child inherits it."""

    def __init__(self) -> None:
        self.primed: dict[Key, Primed] = {}
        self.in_place: dict[Key, InPlace] = {}
        self.pmd = 0  # the size of a huge page, bytes
        self._mapped: dict[Key, tuple[str, int]] = {}  # device and inode, as in smaps
        self._aligned: set[Key] = set()  # objects that need no copy, if their pages were huge
        self._listed: Collection[str] | None = None  # the files that were aligned, once read
        self._replaced: set[Key] = set()  # objects whose file was aligned, and is no longer
        self._remainders: dict[Key, list[Remainder]] = {}
        self._notes: dict[Key, tuple[str, ...]] = {}
        self._attainable: dict[Key, int] = {}  # of the interpreter: code that can be huge, bytes

    def copied(self, *, shared: bool) -> int:
        """Bytes that were copied of objects other than the interpreter, for others to share, or
        for this process."""
        return sum(
            p.bytes
            for p in self.primed.values()
            if not p.object.interpreter and hot.is_shared(p.object, self.pmd) == shared
        )

    def ranges(self) -> list[Range]:
        """What was replaced."""
        return [Range(r.start, r.end) for primed in self.primed.values() for r in primed.regions]

    def regions(self) -> Iterator[tuple[Sequence[Region], Sequence[Region]]]:
        """What is to be on huge pages, of each object, and the mappings that hold it."""
        for primed in self.primed.values():
            yield primed.regions, primed.regions
        for kept in self.in_place.values():
            yield kept.hot or kept.mappings, kept.mappings

    def fault_in(self) -> None:
        """In a forked child, whose page tables have nothing of a file: have all that mapped."""
        for regions, mappings in self.regions():
            fault_in(regions, mappings)

    def starts(self) -> set[int]:
        """The addresses where smaps tells of those."""
        return {mapping.start for _, mappings in self.regions() for mapping in mappings}

    def huge(self, mappings: Iterable[Mapping]) -> int:
        """Bytes of them that are on huge pages."""
        starts = self.starts()
        return sum(mapping.huge for mapping in mappings if mapping.start in starts)

    def huge_of(self, key: Key, mappings: Iterable[Mapping]) -> int:
        """Bytes of one moved object that are on huge pages."""
        starts = {region.start for region in self.primed[key].regions}
        return sum(mapping.huge for mapping in mappings if mapping.start in starts)

    # ----------------------------------------------------------------------------- entering ---

    def enter_plan(self, found: Survey, planned: Plan) -> None:
        """Enter what a plan says of objects that are not moved."""
        self.pmd = found.pmd_size or self.pmd
        self._remainders, self._notes = {}, {}
        for part in planned.remainders:
            self._remainders.setdefault(key_of(part.object), []).append(part)
        for key, primed in self.primed.items():
            self._remainders[key] = plan.explain(primed.object, primed.regions, self.pmd)
        for move in (*planned.moves, *planned.already):
            if move.object.interpreter:
                self._attainable = {key_of(move.object): plan.attainable(move, self.pmd)}
        loaded = {key_of(obj): obj for obj in found.objects}
        self.in_place = {key: kept for key, kept in self.in_place.items() if key in loaded}
        for move in planned.already:
            self.in_place.setdefault(key_of(move.object), InPlace(move.in_place, ALREADY, move.hot))
        whole = {key_of(m.object) for m in (*planned.moves, *planned.already) if m.aligned}
        self._aligned = (self._aligned | whole) & loaded.keys()
        self._note_replaced(loaded)
        for key, kept in self.in_place.items():
            self._remainders[key] = plan.explain(loaded[key], kept.hot or kept.mappings, self.pmd)

    def _note_replaced(self, loaded: dict[Key, Object]) -> None:
        """Note which files are recorded as aligned and are not: an upgrade has replaced them."""
        if self._listed is None:
            self._listed = all_listed()
        self._replaced = {
            key
            for key, obj in loaded.items()
            if self._listed and self.pmd and obj.path in self._listed
            and not is_aligned(obj.headers, self.pmd, fixed=obj.fixed)
        }  # fmt: skip

    def enter_in_place(self, move: Move, backing: str) -> None:
        """Enter an object that has huge pages where it is."""
        key = key_of(move.object)
        self.in_place[key] = InPlace(move.in_place, backing, move.hot)
        self._remainders[key] = plan.explain(move.object, move.hot or move.in_place, self.pmd)

    def enter_moved(self, key: Key) -> None:
        """Say what is not on huge pages of an object that was moved."""
        primed = self.primed[key]
        self._remainders[key] = plan.explain(primed.object, primed.regions, self.pmd)

    def leave(self, obj: Object, reason: Reason, notes: tuple[str, ...]) -> None:
        """Enter why an object stays where it is."""
        self._notes[key_of(obj)] = notes
        self._remainders[key_of(obj)] = [
            Remainder(obj, s.start, s.end, s.kind, reasons.WRITABLE if s.writable else reason)
            for s in obj.segments
        ]

    def enter_files(self, keys: Iterable[Key], mappings: Sequence[Mapping]) -> None:
        """Remember which files moved objects are mapped from, to notice when others take their
        place."""
        for key in keys:
            start = self.primed[key].regions[0].start
            for mapping in overlapping(mappings, start, start + 1):
                self._mapped[key] = mapping.device, mapping.inode

    # --------------------------------------------------------------------------- forgetting ---

    def reconcile(self, found: Survey, moved: Collection[Key] = ()) -> Survey:
        """The survey with the objects that were moved as they were surveyed then: what can be seen
        of them now is what was made of them. What was unloaded since, or unloaded and loaded again
        at the same address, is forgotten."""
        loaded = {key_of(obj): obj for obj in found.objects}
        for key, primed in list(self.primed.items()):
            start = primed.regions[0].start
            here = next(overlapping(found.mappings, start, start + 1), None)
            if key not in loaded or here is None:
                self.forget(key)
            elif key not in self._mapped:  # just moved, or interrupted: then moved or not
                if key in moved or loaded[key].problem == reasons.REMAPPED:
                    self._mapped[key] = here.device, here.inode
                else:
                    self.forget(key)
            elif self._mapped[key] != (here.device, here.inode):
                self.forget(key)
        objects = tuple(
            replace(self.primed[key_of(obj)].object, problem=reasons.REMAPPED)
            if key_of(obj) in self.primed
            else obj
            for obj in found.objects
        )
        return replace(found, objects=objects)

    def put_back(self, key: Key, mappings: Sequence[Mapping]) -> Object:
        """Map an object's own file over what it was moved to. Raises OSError when that fails."""
        primed = self.primed[key]
        put_back(primed, mappings)
        self.forget(key)
        return primed.object

    def put_back_all(self, loaded: Collection[Key]) -> None:
        """Put back what can be; of the rest the report says why. What was unloaded is forgotten."""
        mappings: Sequence[Mapping] = ()
        with suppress(OSError):  # otherwise its bytes must do
            mappings = read_maps()
        for key, primed in list(self.primed.items()):
            if key not in loaded:
                self.forget(key)
                continue
            try:
                self.put_back(key, mappings)
            except ours(OSError) as error:
                note = f"not put back: {reason_of(error)}"
                if note not in primed.notes:
                    self.primed[key] = replace(primed, notes=(*primed.notes, note))
        self._remainders.clear()
        self._notes.clear()
        self.in_place.clear()  # nothing was changed that could be put back

    def forget(self, key: Key) -> None:
        """Give up what a moved object holds: its image and its anchors."""
        primed = self.primed[key]
        with suppress(OSError):
            primed.anchors.unmap()
        if primed.prepared.image is not None:
            primed.prepared.image.close()
        self._mapped.pop(key, None)  # last: a signal handler may raise
        del self.primed[key]

    # ---------------------------------------------------------------------------- reporting ---

    def inherited(self, objects: tuple[ObjectReport, ...]) -> tuple[ObjectReport, ...]:
        """The same in a forked child: what was its parent's own, both have now."""
        if all(self._recurs(primed) for primed in self.primed.values()):
            return objects
        return tuple(replace(o, sharing=o.sharing and "shared") for o in objects)

    def _recurs(self, primed: Primed) -> bool:
        """Whether other processes map the same pages, whoever their parent is."""
        return primed.prepared.backing == "image" and hot.is_shared(primed.object, self.pmd)

    def as_moved(self, objects: Iterable[Object]) -> tuple[Object, ...]:
        """Surveyed objects, those that are moved as they were surveyed before."""
        known = {key: primed.object for key, primed in self.primed.items()}
        return tuple(known.get(key_of(obj), obj) for obj in objects)

    def forget_reasons(self) -> None:
        """Forget why what is not moved is not: the report has it."""
        self._remainders, self._notes = {}, {}

    def describe(
        self, obj: Object, mappings: Sequence[Mapping], before: ObjectReport | None = None
    ) -> ObjectReport:
        """What became of one object, measured.

        Args:
            obj: the object.
            mappings: those of this process.
            before: an earlier report of it, which has the reasons that were forgotten since.
        """
        key = key_of(obj)
        here = list(overlapping(mappings, obj.start, obj.end))
        primed, kept = self.primed.get(key), self.in_place.get(key)
        segments = measure(obj.segments, here, self.pmd, self._remainders.get(key, ()))
        notes = primed.notes if primed else self._notes.get(key, ())
        if before is not None:
            left = {segment.start: segment.left for segment in before.segments}
            segments = tuple(replace(s, left=left.get(s.start, s.left)) for s in segments)
            notes = notes or before.notes
        code = [segment for segment in segments if segment.kind == "code"]
        sharing = None
        if primed:
            mine = primed.maker == (os.getpid(), _core.forks())
            sharing = "private" if mine and not self._recurs(primed) else "shared"
        return ObjectReport(
            path=obj.path,
            interpreter=obj.interpreter,
            backing=primed.prepared.backing if primed else kept.backing if kept else None,
            where=primed.prepared.where if primed else None,
            code_bytes=sum(segment.bytes for segment in code),
            code_huge_bytes=sum(segment.huge_bytes for segment in code),
            huge_bytes=sum(segment.huge_bytes for segment in segments),
            locked_bytes=sum(segment.locked_bytes for segment in segments),
            copied_bytes=primed.bytes if primed else 0,
            written_bytes=primed.prepared.written if primed else 0,
            segments=Segments(segments),
            notes=notes,
            sharing=sharing,
            attainable_bytes=self._attainable.get(key, 0),
            aligned=key in self._aligned,
            no_longer_aligned=key in self._replaced,
        )
