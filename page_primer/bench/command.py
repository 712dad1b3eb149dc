"""`page-primer bench`: the command line, and what becomes of it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from page_primer.bench import (
    counters,
    load,
    machine,
    measure,
    places,
    plot,
    rounds,
    variants,
    vmtouch,
)
from page_primer.bench.celery import Task
from page_primer.bench.failures import CutShort, Failure
from page_primer.bench.interpreter import Copy
from page_primer.bench.progress import Progress
from page_primer.bench.report import Report
from page_primer.bench.tree import Adopted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from page_primer.bench.report import Say, Table

_ROUNDS = 12
_MANY = 1_000_000  # rounds, where time is the limit
_REQUESTS = 2000
_TASKS = 500
_TRIED = 0.1  # of the requests, for the trial of each variant that comes first
_HELP = """
Runs a server with and without priming, in turns and started anew each time, sends it requests, and
compares processor time a request, throughput, latency, memory and faults. Exit status: 0 done;
1 it failed, or rounds are missing; 2 the command line is wrong; 130 interrupted. What is known is
printed in any case.
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="page-primer bench",
        description=_HELP,
        usage="page-primer bench --url URL [options] -- SERVER ...\n"
        "       page-primer bench --celery-task NAME [ARG ...] [options] -- WORKER ...\n"
        "       page-primer bench --command [options] -- COMMAND ...",
    )
    add = made.add_argument
    add("--url", action="append", default=[], dest="urls", metavar="URL",
        help="what to request from the server; may be given several times")  # fmt: skip
    add("--celery-task", nargs="+", metavar=("NAME", "ARGUMENT"),
        help="the task to send to the Celery worker; arguments are JSON, or text")  # fmt: skip
    add("--command", action="store_true", dest="is_script",
        help="what is started is no server but ends by itself")  # fmt: skip
    add("--side-by-side", action="store_true",
        help="with --command: variants run at the same time, and one works while the others are "
        "stopped")  # fmt: skip
    add("--requests", type=_positive, metavar="N",
        help=f"a round for each variant (default: {_REQUESTS}; tasks: {_TASKS})")  # fmt: skip
    add("--connections", type=_positive, default=8, metavar="N",
        help="requests or tasks at a time (default: %(default)s)")  # fmt: skip
    add("--rounds", type=_positive, metavar="N",
        help=f"default: {_ROUNDS}, or what --minutes allows")  # fmt: skip
    add("--minutes", type=float, metavar="M", help="end when another round would take longer")
    add("--variants", default=variants.DEFAULT, metavar="LIST",
        help=f"of {', '.join(variants.KNOWN)}, and NAME:option=value:... with options of prime() "
        "(default: %(default)s)")  # fmt: skip
    add("--start-timeout", type=float, default=60.0, metavar="SECONDS",
        help="for a server to answer (default: %(default).0f)")  # fmt: skip
    add("--seed", type=int, default=1, metavar="N", help="of the order within rounds")
    add("--json", metavar="FILE", help="write everything that was measured")
    add("--plot", metavar="FILE", help="write a picture of the ratios")
    return made


def main(words: Sequence[str], show_table: Table, say: Say) -> int:
    """Do what the command line says; returns the exit status.

    Args:
        words: behind `page-primer bench`. What follows the first `--` is the user's command.
        show_table: prints columns.
        say: prints a sentence.

    Raises:
        ValueError: the command line is wrong; the message says how.
    """
    at = words.index("--") if "--" in words else len(words)
    given, command = parser().parse_args(words[:at]), words[at + 1 :]
    listed = _check(given, command)
    try:
        with _interrupted_by_signals() as check, contextlib.ExitStack() as stack:
            bench = _prepare(given, command, listed, stack)
            report = _measure(given, bench, listed, check)
            return _conclude(given, report, show_table, say)
    except (Failure, CutShort) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("page-primer: bench: interrupted before the first round", file=sys.stderr)
        return 130


def _check(given: argparse.Namespace, command: Sequence[str]) -> list[variants.Variant]:
    if not command:
        raise ValueError("bench: no command (`-- COMMAND ...` comes last)")
    if sum(map(bool, (given.urls, given.celery_task, given.is_script))) != 1:
        raise ValueError("bench: give one of --url, --celery-task and --command")
    if given.side_by_side and not given.is_script:
        raise ValueError("--side-by-side is for --command: of a server, write {port} in its "
                         "command, of a Celery worker {queue}")  # fmt: skip
    if given.minutes is not None and not given.minutes > 0:
        raise ValueError("--minutes must be above 0")
    listed = variants.parse(given.variants)
    if given.is_script and any(variant.vmtouch for variant in listed):
        raise ValueError("--variants: vmtouch needs a server: a command has ended when it is ready")
    places.check(command, given.urls, task=bool(given.celery_task))
    variants.check_environment()
    return listed


def _prepare(
    given: argparse.Namespace,
    command: Sequence[str],
    listed: Sequence[variants.Variant],
    stack: contextlib.ExitStack,
) -> measure.Bench:
    environ = dict(os.environ)
    if not shutil.which(command[0]):
        raise Failure(f"{command[0]}: command not found")
    if given.plot:
        plot.check()
    if any(variant.vmtouch for variant in listed):
        vmtouch.check()
    task = Task.of(given.celery_task, command, environ) if given.celery_task else None
    bench = measure.Bench(
        command=command, requests=given.requests or (_TASKS if task else _REQUESTS),
        connections=given.connections, tree=Adopted(), counters=counters.available(),
        environ=environ, start_seconds=given.start_timeout, task=task, urls=given.urls,
        is_script=given.is_script, generator=load.generator() if given.urls else "",
        random=random.Random(given.seed), together=given.side_by_side,
    )  # fmt: skip
    # Nothing is left running, whatever ends this.
    stack.callback(bench.forget)
    stack.callback(bench.tree.stop)
    if any(variant.aligned for variant in listed):
        bench.aligned = stack.enter_context(Copy(command, environ))
    return bench


def _measure(
    given: argparse.Namespace,
    bench: measure.Bench,
    listed: Sequence[variants.Variant],
    check_interrupt: Callable[[], None],
) -> Report:
    limit = given.minutes * 60 if given.minutes else None
    plan = rounds.Plan(given.rounds or (_MANY if limit else _ROUNDS), limit)
    with Progress(plan, len(listed)) as progress:
        for variant in listed:
            # Not counted: bytecode, images and the page cache are there afterwards, as they are
            # for every start of a server but the first.
            progress.note(f"trying {variant.name}")
            check_interrupt()
            try:
                bench.measure(variant, max(bench.connections, int(bench.requests * _TRIED)))
            except (Failure, CutShort) as error:
                raise Failure(f"{variant.name}: {error}") from None
        progress.note("measuring how huge huge pages are (a pointer chase)")
        probed = machine.probe()
        bench.obtained.clear()

        def told(course: rounds.Course, variant: variants.Variant, at: int) -> None:
            progress.told(course, variant, at)
            check_interrupt()

        course = rounds.go(listed, bench.round, plan, seed=given.seed, told=told)
    names = ("requests", "connections", "rounds", "minutes", "variants", "seed", "urls")
    return Report(
        command=list(bench.command), variants=[variant.name for variant in listed], course=course,
        settings={**{name: getattr(given, name) for name in names}, "requests": bench.requests},
        unit="task" if bench.task else "run" if bench.is_script else "request",
        counters=bench.counters.missing, generator=bench.generator, obtained=bench.obtained,
        probe=probed, side_by_side=bench.side_by_side, notes=_notes(bench, listed),
    )  # fmt: skip


def _notes(bench: measure.Bench, listed: Sequence[variants.Variant]) -> list[str]:
    names = [variant.name for variant in listed if variant.locks_alone]
    if not bench.side_by_side or not names:
        return []
    return [
        f"{', '.join(names)}: pages of files are locked for every process that maps them, so side "
        "by side `off` has them locked, too"
    ]


def _conclude(given: argparse.Namespace, report: Report, show_table: Table, say: Say) -> int:
    report.show(show_table, say)
    if given.json:
        try:
            with open(given.json, "w", encoding="utf-8") as file:
                json.dump(report.as_dict(), file, indent=1)
                file.write("\n")
        except OSError as error:
            return _fail(f"--json: {given.json}: {error.strerror}")
    if given.plot and report.course.rounds:
        plot.write(report, given.plot)
    if report.course.interrupted:
        return 130
    return 1 if report.course.ended else 0


def _fail(line: str) -> int:
    print(f"page-primer: bench: {line}", file=sys.stderr)
    return 1


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[Callable[[], None]]:
    """SIGTERM and SIGHUP are as Ctrl-C, unless they are ignored (nohup). Gives what raises it again
    if it was lost: in fork hooks, logging's for one, CPython prints exceptions and goes on."""
    came = False

    def interrupt(number: int, _frame: object) -> NoReturn:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
