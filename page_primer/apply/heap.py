"""What `heap` and `freeze` keep of this process. A forked child inherits all of it."""

from __future__ import annotations

from page_primer._lean import replace
from page_primer._loading import Loading
from page_primer.kernel.thp import pmd_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.heap.driver import Heap
    from page_primer.heap.freeze import Frozen
    from page_primer.options import Options
    from page_primer.report import Report


class HeapState:
    """Loads the modules of either option where it is asked for, and not before."""

    def __init__(self) -> None:
        self._heap: Heap | None = None
        self._frozen: Frozen | None = None

    def start(self, options: Options) -> None:
        """Before an application is loaded: have its arenas huge, and leave the rest to prime()."""
        if options.enabled and options.heap:
            self._made().start(options, pmd_size())

    def prime(self, report: Report, options: Options, huge: int) -> Report:
        """Do what the options say, at the end of a first prime(), so that what that has loaded is
        frozen too. Returns the report, with what came of it."""
        if options.heap or self._heap is not None:
            report = replace(report, heap=self._made().prime(options, huge))
        return self._freeze(report, options)

    def prime_again(self, report: Report, options: Options, huge: int, *, child: bool) -> Report:
        """The same where nothing was loaded since; `child`: in a process forked since."""
        heap = self._heap
        if heap is not None and (heap.is_new() or (child and options.heap_unshare)):
            report = replace(report, heap=heap.prime(options, huge))
        return self._freeze(report, options)

    def thaw(self) -> None:
        """Have the next prime() freeze once more, if it is to: the application was loaded anew."""
        if self._frozen is not None:
            self._frozen.thaw()

    def restore(self) -> None:
        """Make no more arenas, and thaw."""
        if self._heap is not None:
            self._heap.restore()
        self.thaw()

    def _made(self) -> Heap:
        if self._heap is None:
            with Loading():  # modules that only this option needs
                from page_primer.heap.driver import Heap

            self._heap = Heap()
        return self._heap

    def _freeze(self, report: Report, options: Options) -> Report:
        """Freeze, unless that was done here or in the process that this one was forked from, or is
        not to be."""
        if options.freeze:
            if self._frozen is None:
                with Loading():  # a module that only this option needs
                    from page_primer.heap.freeze import Frozen

                self._frozen = Frozen()
            self._frozen.freeze()
        frozen = self._frozen.objects if self._frozen else None
        return report if report.frozen == frozen else replace(report, frozen=frozen)
