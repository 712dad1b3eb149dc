"""A server's processes: what they have used so far, the memory they hold, and their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_CPUCLOCK_SCHED = 2
_TICK = os.sysconf("SC_CLK_TCK")
# Of the busiest process's time, what a worker has used at least; a master, a resource tracker or a
# scheduler is below.
_WORKER_SHARE = 0.1
_IDLE = 0.03  # of a core: a server that waits for requests
END_SECONDS = 1.0  # within which a process ends whose files and connections have
_GIVE_UP = 5.0  # seconds after the first SIGKILL
_LOOK_SECONDS = 0.25


@dataclass(frozen=True)
class Used:
    """What a process tree has used so far, ended descendants included."""

    processor: dict[int, float]  # seconds, by process; 0 stands for those that have ended
    minor_faults: int
    major_faults: int

    @property
    def seconds(self) -> float:
        return sum(self.processor.values())

    def __add__(self, other: Used) -> Used:
        return self._with(other, 1)

    def __sub__(self, before: Used) -> Used:
        return self._with(before, -1)

    def _with(self, other: Used, sign: int) -> Used:
        return Used(
            {pid: self.processor.get(pid, 0.0) + sign * other.processor.get(pid, 0.0)
             for pid in {**self.processor, **other.processor}},
            self.minor_faults + sign * other.minor_faults,
            self.major_faults + sign * other.major_faults,
        )  # fmt: skip


@dataclass
class Adopted:
    """Descendants of this process, those of `helpers` aside: all that a server started, also where
    it made itself a daemon (prctl(2), PR_SET_CHILD_SUBREAPER)."""

    helpers: set[int] = field(default_factory=set)
    session: int = 0  # of several servers, the one that began as this session's leader; 0: all

    def __post_init__(self) -> None:
        _prctl(_PR_SET_CHILD_SUBREAPER)

    def only(self, session: int) -> Adopted:
        """Those of one server among several, as long as what it leaves to this process stays in
        its session."""
        return replace(self, session=session)

    def processes(self) -> list[int]:
        """The server's processes, parents before children; ended ones that nobody waited for
        included."""
        children: dict[int, list[int]] = {}
        session: dict[int, int] = {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with contextlib.suppress(OSError, IndexError):
                values = _stat(pid)
                children.setdefault(int(values[1]), []).append(pid)
                session[pid] = int(values[3])
        found = [pid for pid in sorted(children.get(os.getpid(), []))
                 if pid not in self.helpers and self.session in (0, session[pid])]  # fmt: skip
        for pid in found:
            found += sorted(children.get(pid, []))
        return found

    def live(self) -> list[int]:
        """Those that have not ended."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):
                found += [pid] if _stat(pid)[0] not in "ZX" else []
        return found

    def used(self) -> Used:
        """What the server has used so far.

        A process's clock (clock_getcpuclockid(3)) counts nanoseconds and threads that have ended;
        what it has waited for is in its stat, in ticks.
        """
        processor: dict[int, float] = {0: 0.0}
        minor = major = 0
        for pid in self.processes():
            with contextlib.suppress(OSError, IndexError):
                seconds = time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
                # proc_pid_stat(5); the fields from the third on.
                values = _stat(pid)
                processor[pid] = seconds
                processor[0] += (int(values[13]) + int(values[14])) / _TICK
                minor += int(values[7]) + int(values[8])
                major += int(values[9]) + int(values[10])
        return Used(processor, minor, major)

    def settle(self, seconds: float = 5.0) -> None:
        """Wait until the server waits for requests, or as long as given: workers may still be
        loading the application when one of them answers."""
        end = time.monotonic() + seconds
        before, began = self.used().seconds, time.monotonic()
        while began < end:
            time.sleep(_LOOK_SECONDS)
            now, at = self.used().seconds, time.monotonic()
            if now - before < _IDLE * (at - began):
                return
            before, began = now, at

    def stop(self, seconds: float = 10.0, more_seconds: float = 1.0) -> None:
        """End every process: by SIGTERM to the oldest, which may end the others in its way, then to
        those that it left, and by SIGKILL what does not end so.

        Signals for this process wait meanwhile. What five seconds later has not ended (another
        user's, or one that waits for a disk) is left.

        Args:
            seconds: that the oldest has.
            more_seconds: that those have which it left.
        """
        with _held_back(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            end = time.monotonic() + seconds
            oldest = asked = 0
            while left := [pid for pid in self.processes() if not self._reap(pid)]:
                if left[0] != asked:
                    if oldest and asked == oldest:
                        end = time.monotonic() + more_seconds
                    asked = left[0]
                    oldest = oldest or asked
                    _send(asked, signal.SIGTERM)
                    for pid in left:
                        _send(pid, signal.SIGCONT)  # where it was stopped
                if time.monotonic() > end + _GIVE_UP:
                    return
                if time.monotonic() > end:
                    for pid in left:
                        _send(pid, signal.SIGKILL)
                time.sleep(0.01)

    def _reap(self, pid: int) -> bool:
        """Whether a process has ended; a child of ours is waited for."""
        with contextlib.suppress(OSError, IndexError):
            values = _stat(pid)
            if int(values[1]) == os.getpid():
                return os.waitpid(pid, os.WNOHANG)[0] == pid
            return values[0] in "ZX"
        return True


def workers(used: Used) -> list[int]:
    """The processes that did the work."""
    seconds = {pid: took for pid, took in used.processor.items() if pid}
    most = max(seconds.values(), default=0.0)
    return [pid for pid, took in seconds.items() if took >= most * _WORKER_SHARE and most > 0]


@dataclass(frozen=True)
class Held:
    """Bytes of memory."""

    pss: int
    private: int


def memory(pid: int) -> Held:
    """The memory of a process (proc_pid_smaps_rollup(5)).

    Raises:
        OSError: it has ended, or is not ours to look at.
    """
    counts: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup", encoding="utf-8", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) == 3 and words[2] == "kB":
                counts[words[0]] = int(words[1]) << 10
    private = ("Private_Clean:", "Private_Dirty:", "Private_Hugetlb:")
    return Held(counts["Pss:"], sum(counts.get(name, 0) for name in private))


def average(pids: Iterable[int]) -> Held | None:
    """The mean of several processes."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, KeyError):
            found.append(memory(pid))
    if not found:
        return None
    count = len(found)
    return Held(sum(h.pss for h in found) // count, sum(h.private for h in found) // count)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def dies_with_us(by: signal.Signals = signal.SIGTERM) -> Callable[[], None]:
    """What a child has to call between fork and exec to be ended with this process, should that be
    killed; by SIGKILL, where it may be stopped then."""
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)

    return ask


def _prctl(what: int) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.prctl(what, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: a name may have spaces and brackets."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


@contextlib.contextmanager
def _held_back(*numbers: signal.Signals) -> Iterator[None]:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
