"""The driver: survey, plan, move, lock and measure this process, and undo it."""

from __future__ import annotations

import os
import time

from page_primer import _core, budget, mlock_plan, plan, reasons, survey
from page_primer._lean import is_ours, replace, suppress
from page_primer._loading import Loading
from page_primer.apply.heap import HeapState
from page_primer.apply.measured import measured
from page_primer.apply.mlocks import Mlocks
from page_primer.apply.registry import Registry
from page_primer.apply.swap import Key, NotMoved, carry_out, key_of
from page_primer.backing import directories, in_place
from page_primer.backing.pieces import reason_of
from page_primer.elf.objects import Object, Range
from page_primer.kernel import memory, smaps
from page_primer.kernel.memory import Memory
from page_primer.kernel.smaps import Mapping
from page_primer.options import IN_PLACE, Options
from page_primer.plan import Move
from page_primer.report import Report
from page_primer.words import milliseconds_since

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from page_primer.apply.perfmap import PerfMap
    from page_primer.images.places import Place
    from page_primer.outcome import ObjectReport


class Process:
    """The primed state of this process. A forked child inherits it, but for the locks."""

    def __init__(self) -> None:
        # In another PID namespace a child may have its parent's number.
        self.identity = (0, 0)  # PID, forks since the first
        self.loads = (0, 0)  # the loader's counters when it was surveyed last
        self.options: Options | None = None
        self.objects: tuple[Object, ...] = ()
        self.registry = Registry()
        self.mlocks = Mlocks()
        self.memory: Memory | None = None  # what was available when the plan was made
        self.perf_map: PerfMap | None = None
        self.huge = 0  # bytes on huge pages of what is to be, when last measured
        self.report: Report | None = None  # None while a call is under way
        self.shown: Report | None = None  # the last one, for other threads
        self.heap = HeapState()
        self.resident = 0, 0  # bytes by which priming made this process grow, and had before a call

    def prime(self, options: Options) -> Report:
        """Bring the process to the primed state; see page_primer.prime()."""
        began = time.perf_counter()
        child = self.identity != (identity := (os.getpid(), _core.forks()))
        last = self.report if self.options == options and self.loads == _core.loads() else None
        if last is None and self.options is not None:  # else it has been asked already
            memory.require_mappings()
        self.identity = identity
        if last is not None:
            if child:
                self.report = None  # should this not come to its end
                self.resident = 0, memory.resident()
                last = last if self._inherit() else self.measure_again(last, began)
                last = replace(last, objects=self.registry.inherited(last.objects))
            if child or last.moved:
                last = replace(
                    last, pid=identity[0], moved=(), milliseconds=milliseconds_since(began)
                )
                last = replace(last, resident_bytes=self._grown() if child else self.resident[0])
            last = self.heap.prime_again(last, options, self.registry.pmd, child=child)
            self.report = self.shown = last  # from now on the same, which costs a caller least
            return last
        self.report = None  # as above
        self.resident = 0 if child else self.resident[0], memory.resident()
        # By the parent too, so that locking it here takes no memory.
        held = budget.disjoint([*self.registry.ranges(), *self.mlocks.made])
        if child:
            self.mlocks.forget()
            self.registry.fault_in()
        moved = self._move_new(options, held)
        mappings = self._lock_and_look(moved, options, held)
        # Of the first backing that could be prepared, smaps was not asked yet.
        if self._move_small_again(moved, mappings, options):
            mappings = self._lock_and_look(moved, options, held)
            if self._take_back_small(moved, mappings):
                mappings = self._lock_and_look(moved, options, held)
        self.registry.enter_files(moved, mappings)
        self._write_perf_map()
        report = self._measure(moved, mappings, began)
        self._let_go()
        self.report = self.shown = self.heap.prime(report, options, self.registry.pmd)
        return self.report

    def _grown(self) -> int:
        """By how much priming made this process grow; what the call has taken so far is entered."""
        now = memory.resident()
        self.resident = self.resident[0] + now - self.resident[1], now
        return self.resident[0]

    def start_heap(self, options: Options) -> Report:
        """Before an application is loaded: have its arenas huge, and leave the rest to prime()."""
        self.heap.start(options)
        return self.report or Report(os.getpid(), None)

    def thaw(self) -> Report:
        """Have the next prime() freeze once more, if it is to: the application was loaded anew."""
        self.heap.thaw()
        return self.report or Report(os.getpid(), None)

    def restore(self) -> Report:
        """Put everything back; see page_primer.restore()."""
        began = time.perf_counter()
        loaded = {(base, headers) for _, base, headers in _core.objects()[2]}
        self.mlocks.release_for_host()
        self.mlocks.unlock(loaded)
        self.registry.put_back_all(loaded)
        self.mlocks.give_back_to_host()
        self.heap.restore()
        before = Report(os.getpid(), None)
        surveyed, self.options = self.options is not None or self.report is not None, None
        self.report = self.shown = (
            self.measure_again(before, began) if surveyed else self._measure((), (), began)
        )
        return self.report

    def lock_in_child(self) -> Report:
        """In a forked child: lock what the parent had locked, and nothing else."""
        self.mlocks.make_again()
        made, refused = self.mlocks.sizes
        report = self.report or Report(os.getpid(), None)
        return replace(
            report, pid=os.getpid(), lock_wanted_bytes=made + refused, lock_refused_bytes=refused
        )

    def _inherit(self) -> bool:
        """In a forked child: lock what the parent had locked, which a fork does not inherit, and
        have the moved code mapped. Returns whether everything is as it was in the parent, so that
        the parent's measurements hold."""
        before = self.huge, self._perf_map_outcome()
        locked = self.mlocks.make_again()
        self.registry.fault_in()
        self._write_perf_map()
        self.huge = self.registry.huge(smaps.starting_at(self.registry.starts()))
        return locked and before == (self.huge, self._perf_map_outcome())

    # -------------------------------------------------------------------------------- moving ---

    def _move_new(self, options: Options, held: Sequence[Range]) -> dict[Key, Move]:
        """Survey the process and move what can be moved and is not yet; returns what was."""
        registry = self.registry
        known = len(registry.primed)
        found = registry.reconcile(survey.take())
        if len(registry.primed) < known:  # what was forgotten may have left something mapped
            found = registry.reconcile(survey.take())
        self.mlocks.note_host(found)
        planned = plan.make(
            found, options, registry.copied(shared=True), held, registry.copied(shared=False)
        )
        registry.enter_plan(found, planned)
        self.memory, self.objects = found.memory, found.objects
        self.options, self.loads = options, found.loads
        copies = self._bring_in_place(planned.moves, options)
        places = directories(options) if copies else []
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

    def _bring_in_place(self, moves: Sequence[Move], options: Options) -> list[Move]:
        """Have huge pages where the loader mapped the code, as the options say: of objects of which
        that covers as much as a copy, or of all. Returns the moves that are still to be made."""
        only = options.backing == IN_PLACE
        if not only and options.backing != "auto":
            return [move for move in moves if move.image]
        failed = self._try_in_place([m for m in moves if m.aligned or only], partly=only)
        for move in failed:
            self.registry.leave(move.object, move.object.problem or reasons.NO_BACKING, move.notes)
        if only:
            return []
        again = {key_of(move.object): move for move in failed}
        rest = [again.get(key_of(m.object), m) for m in moves]
        return [m for m in rest if m.image and key_of(m.object) not in self.registry.in_place]

    def _try_in_place(self, moves: Sequence[Move], *, partly: bool) -> list[Move]:
        """Returns the moves that did not come out huge throughout, or, if a part is good enough, as
        it is of what cannot be copied, not at all; with what came of it in their notes."""
        pmd = self.registry.pmd
        outcomes = in_place.bring_in(moves, pmd) if moves else []
        failed = []
        for move, outcome in zip(moves, outcomes, strict=True):
            if outcome.complete or (outcome.huge and (partly or not move.image)):
                self.registry.enter_in_place(move, outcome.backing)
            else:
                note = f"in place: {outcome.huge} of {outcome.wanted} bytes huge"
                failed.append(replace(move, notes=(*move.notes, note)))
        return failed

    def _move(
        self, move: Move, options: Options, places: Sequence[Place], *, verified: bool
    ) -> bool:
        """Move one object, or note why it is left. Returns whether it was moved."""
        registry = self.registry
        key = key_of(move.object)
        try:
            carry_out(move, registry.pmd, options, places, registry.primed, verified=verified)
        except NotMoved as why:
            registry.leave(move.object, why.reason, why.notes)
            return False
        except Exception as error:  # whatever it is, it concerns this object alone
            if not is_ours(error):
                raise
            if key in registry.primed:
                with suppress(OSError):
                    self._put_back(key)
            text = f"{type(error).__name__}: {error}"
            note = reason_of(error) if isinstance(error, OSError) else text
            registry.leave(move.object, reasons.UNEXPECTED, (note,))
            return False
        registry.enter_moved(key)
        return True

    def _move_small_again(
        self, moved: dict[Key, Move], mappings: Sequence[Mapping], options: Options
    ) -> bool:
        """Put back what is not on huge pages throughout, and move it to the first backing that
        smaps confirms. Returns whether there was any."""
        registry = self.registry
        small = [
            key
            for key in moved
            if registry.huge_of(key, mappings) < registry.primed[key].prepared.wanted
        ]
        places = directories(options) if small else []
        for key in small:
            with suppress(OSError):
                self._put_back(key)
                if not self._move(moved[key], options, places, verified=True):
                    del moved[key]
        return bool(small)

    def _take_back_small(self, moved: dict[Key, Move], mappings: Sequence[Mapping]) -> bool:
        """Put back what was huge where it was prepared, but is not where it was moved to: that is
        not what was asked for. Returns whether there was any."""
        small = [key for key in moved if not self.registry.huge_of(key, mappings)]
        for key in small:
            with suppress(OSError):
                primed = self.registry.primed[key]
                self._put_back(key)
                notes = *primed.notes, f"{primed.prepared.where}: small pages after the swap"
                self.registry.leave(primed.object, reasons.SMALL_AFTER_SWAP, notes)
                del moved[key]
        return bool(small)

    def _put_back(self, key: Key) -> None:
        """Put one object back, with the host's locks on it. Raises OSError when that fails."""
        self.mlocks.put_back(self.registry.put_back(key, smaps.read_maps()))

    # ------------------------------------------------------------------- locking, measuring ---

    def _lock_and_look(
        self, moved: dict[Key, Move], options: Options, held: Sequence[Range]
    ) -> Sequence[Mapping]:
        """Lock what is there after the moves, as far as memory allows beside them, and read what
        came of both. What was `held` before takes no more memory."""
        primed = self.registry.primed
        loaded = _core.loads() != self.loads
        self.mlocks.relock_for_host(r for key in moved for r in primed[key].regions)
        mappings = self._survey_again(moved) if loaded else smaps.read_maps()
        wanted = mlock_plan.locks(self.objects, mappings, options, self.registry.pmd)
        del mappings
        room = budget.memory_room(self.memory, options, held)
        copies = [primed[key] for key in moved]
        room -= sum(budget.size_of(copy.object, copy.regions) for copy in copies)
        paid = [*held, *(Range(s.start, s.end) for copy in copies for s in copy.object.segments)]
        allowed, withheld = mlock_plan.affordable(wanted, room, paid)
        self.mlocks.withheld = sum(lock.end - lock.start for lock in withheld)
        self.mlocks.make(allowed)
        del wanted, allowed, withheld  # before the mappings are read once more
        return smaps.read_own()

    def _survey_again(self, moved: dict[Key, Move]) -> Sequence[Mapping]:
        """Writing an image loads modules, which are to be locked as well: find what was loaded
        since the survey, and strike from `moved` what was unloaded. Returns the mappings, as maps
        has them."""
        known = [obj for obj in self.objects if key_of(obj) not in self.registry.primed]
        found = self.registry.reconcile(survey.take(smaps.read_maps, known), moved)
        self.objects, self.loads = found.objects, found.loads
        for key in moved.keys() - self.registry.primed.keys():
            del moved[key]
        return found.mappings

    def _let_go(self) -> None:
        """Forget what a survey found and a plan said: the report has it, in a form that takes less
        of this process's memory for the rest of its life."""
        self.objects = ()
        self.registry.forget_reasons()

    def measure_again(self, last: Report, began: float) -> Report:
        """Measure what was moved before; an earlier report has the reasons for the rest."""
        found = survey.take()
        self.objects = self.registry.as_moved(found.objects)
        reported = {obj.segments[0].start: obj for obj in last.objects if obj.segments}
        report = self._measure((), found.mappings, began, reported)
        self._let_go()
        return report

    def _measure(
        self,
        moved: Iterable[Key],
        mappings: Sequence[Mapping],
        began: float,
        reported: dict[int, ObjectReport] | None = None,
    ) -> Report:
        self.huge = self.registry.huge(mappings)
        known = reported or {}
        objects = (self.registry.describe(o, mappings, known.get(o.start)) for o in self.objects)
        return replace(
            measured(self.options, self.mlocks),
            objects=tuple(objects),
            moved=tuple(self.registry.primed[key].object.path for key in moved),
            perf_map=self._perf_map_outcome(),
            memory=self.memory,
            resident_bytes=self._grown(),
            milliseconds=milliseconds_since(began),
        )

    def _write_perf_map(self) -> None:
        if self.options is not None and self.options.perf_map:
            with Loading():  # most processes have none
                from page_primer.apply.perfmap import PerfMap

            self.perf_map = self.perf_map or PerfMap()
            self.perf_map.update(self.registry.primed)

    def _perf_map_outcome(self) -> str | None:
        return self.perf_map.outcome if self.perf_map else None


process = Process()
os.register_at_fork(before=_core.before_fork, after_in_parent=_core.after_fork)
