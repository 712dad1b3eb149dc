"""The checks in the order of a diagnosis, and the facts that several of them use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

from page_primer import budget, plan, survey
from page_primer.backing import image as image_backing
from page_primer.doctor import alignment, checks, coverage, directories, facts, locking, preloaded
from page_primer.doctor.coverage import Interpreter
from page_primer.doctor.findings import INFO, OK, Check
from page_primer.doctor.probes import Trial, try_directory, try_image, try_memory
from page_primer.heap.advice import LEFT_ALONE, advice
from page_primer.images.places import Place
from page_primer.kernel.memlock import try_lock
from page_primer.kernel.thp import pmd_size
from page_primer.options import IN_PLACE, Options
from page_primer.plan import Plan
from page_primer.survey import Survey


def judge_heap(options: Options, huge: int) -> Check:
    """What `heap` can do here."""
    status, found, fix = advice(options, huge)
    if status == OK:
        return Check("heap", OK, found)
    refused = found.startswith(LEFT_ALONE)
    return Check("heap", status, found, fix, code="heap-left-alone" if refused else "heap-off")


class Examination:
    """The facts that several checks want, gathered once."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.settings = facts.read_settings(pmd_size())
        self.process = facts.read_process()
        self.container = checks.judge_container(*facts.read_container())
        self.trials: list[Trial] = []
        self._seen: tuple[Survey, Plan] | None = None

    def checks(self) -> list[tuple[str, Callable[[], Iterable[Check]]]]:
        """The checks in the order of a diagnosis: names for when they fail, and functions."""
        settings, process, options = self.settings, self.process, self.options
        return [
            ("switch", lambda: checks.judge_switch(options)),
            ("kernel", lambda: [checks.judge_kernel(settings.kernel)]),
            ("transparent huge pages", lambda: [checks.judge_thp(settings)]),
            ("shmem huge pages", lambda: [checks.judge_shmem(settings)]),
            ("memfd_noexec", lambda: checks.judge_memfd_noexec(settings)),
            ("THP of this process", lambda: [checks.judge_thp_disabled(process.thp_disabled)]),
            ("write-execute", lambda: [checks.judge_mdwe(process.mdwe, options)]),
            ("container", lambda: [self.container]),
            ("interpreter", lambda: [coverage.judge_interpreter(self.layout(), options)]),
            ("alignment", self.alignment),
            ("image directories", self.directories),
            ("memory", self.memory),
            ("hugetlb pool", lambda: [checks.judge_pool(settings, options, self.pool_pages())]),
            (
                "backing",
                lambda: [
                    coverage.judge_backing(self.trials, self.layout(), options, settings.kernel)
                ],
            ),
            ("locking", self.locking),
            ("available memory", self.available),
            ("heap", lambda: [judge_heap(options, settings.pmd)]),
            ("preloading", lambda: preloaded.judge(preloaded.find(), options)),
        ]

    @property
    def in_container(self) -> bool:
        return self.container.status == INFO

    def seen(self) -> tuple[Survey, Plan]:
        """The survey of this process and the plan for it."""
        if self._seen is None:
            found = survey.take()
            self._seen = found, plan.make(found, self.options)
        return self._seen

    def layout(self) -> Interpreter:
        return coverage.describe(*self.seen(), coverage.has_directory(self.options))

    def alignment(self) -> Iterator[Check]:
        found, _ = self.seen()
        obj = next(obj for obj in found.objects if obj.interpreter)
        layout = self.layout()
        loaded = [other.path for other in found.objects]
        facts = alignment.read(
            obj.path, loaded, huge=layout.already, program=obj.main, merge=self.options.merge
        )
        # Where code is left alone, nothing is missing.
        left_alone = layout.problem or not self.options.remap
        share = 1.0 if left_alone else max(layout.image.share, layout.memory.share)
        yield alignment.judge_alignment(facts, self.settings.kernel, found.pmd_size, share)

    def directories(self) -> Iterator[Check]:
        if not self.can_try or self.options.backing not in ("auto", "image"):
            return
        named = self.options.image_dir is not None or self.options.backing == "image"
        needed = self.layout().copied_bytes
        for place in image_backing.directories(self.options):
            name = f"image directory {place.path}"
            if place.reason:
                text = f"passed over: {place.reason}"
                yield Check(name, INFO, text, code="directory-passed-over")
                continue
            directory = facts.read_directory(place.path)
            trial = self._try_image(place)
            if trial is None and place.system:
                yield directories.judge_system(place.path)
                continue
            trial = trial or try_directory(place, self.settings.pmd)
            others = any(other.works for other in self.trials)
            yield directories.judge_directory(
                trial, directory, self.settings,
                needed=needed, named=named, needless=others, container=self.in_container,
            )  # fmt: skip
            self.trials.append(trial)

    def _try_image(self, place: Place) -> Trial | None:
        """The interpreter's image in a directory, if there is one."""
        _, planned = self.seen()
        move = next((move for move in planned.moves if move.object.interpreter), None)
        if move is None or not move.image or not os.path.isdir(place.path):
            return None
        return try_image(place, move, self.settings.pmd)

    def memory(self) -> Iterator[Check]:
        if not self.can_try:
            return
        wanted = self.options.backing
        for name in ("memfd", "anonymous") if wanted == "auto" else (wanted,):
            # Pages of the pool are the administrator's: not touched unless asked for.
            if name in ("image", IN_PLACE):
                return
            trial = try_memory(name, self.settings.pmd)
            others = any(other.works for other in self.trials)
            yield directories.judge_memory(
                trial, self.settings, self.process, named=wanted == name, needless=others
            )
            self.trials.append(trial)

    @property
    def can_try(self) -> bool:
        # arm64 with 64 KiB pages has huge pages of 512 MiB: no trial is worth a gigabyte.
        return self.options.remap and 0 < self.settings.pmd <= 32 << 20

    def pool_pages(self) -> int:
        """What the interpreter would take of the hugetlb pool, pages."""
        _, planned = self.seen()
        move = next((move for move in planned.moves if move.object.interpreter), None)
        if move is None or not self.settings.pmd:
            return 0
        regions = coverage.in_memory(move, coverage.has_directory(self.options))
        return sum(region.end - region.start for region in regions) // self.settings.pmd

    def locking(self) -> Iterator[Check]:
        if not self.options.mlock:
            yield Check("locking", INFO, "mlock is off", code="locks-off")
            return
        code, everything = locking.lock_sizes(*self.seen(), self.options)
        spare = locking.margin_of(self.process)
        yield locking.judge_locking(
            self.process, code, everything, try_lock(code + spare), try_lock(everything + spare)
        )

    def available(self) -> Iterator[Check]:
        found, planned = self.seen()
        _, wanted = locking.lock_sizes(found, planned, self.options)
        copies = sum(budget.size_of(move.object, move.image) for move in planned.moves)
        wanted = max(wanted, copies)
        yield locking.judge_available(found.memory, self.options.memory_share, wanted)
