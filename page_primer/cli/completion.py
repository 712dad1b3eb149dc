"""Completion in a shell, by argcomplete (the extra `cli`): eval "$(register-python-argcomplete
page-primer)"."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from page_primer.options import BACKINGS, HEAP_MODES, flag
from page_primer.options import TABLE as OPTIONS

_CHOICES = {
    "backing": BACKINGS,
    "mlock": ("all", "code", "off"),
    "heap": (*HEAP_MODES, "off"),
}


def run(parser: argparse.ArgumentParser) -> int:
    """Answer the shell's question, which is in the environment; returns the exit status."""
    try:
        from argcomplete import autocomplete  # the extra
    except ImportError:
        return 1
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, other in _others():
        commands.choices[name] = other
    _complete(commands.choices["run"], {option.name: _values(option) for option in OPTIONS})
    _complete(commands.choices["run"], {"argv": _commands})
    _complete(commands.choices["status"], {"pid": _pythons})
    _complete(commands.choices["doctor"], {"user": _users})
    autocomplete(parser)
    return 1  # it has ended this process, unless nothing was asked


def _others() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Parsers of the commands that have their own, as far as they can be imported."""
    try:
        from page_primer.launcher import warm  # of this command alone, as the next ones

        yield "warm", warm.parser()
        from page_primer.bench import command as bench  # likewise

        yield "bench", bench.parser()
        from page_primer.cli import build  # likewise

        yield "build", build.parser()
    except ImportError:  # without the C core
        pass


def _complete(parser: argparse.ArgumentParser, completers: dict[str, Any]) -> None:
    for action in parser._actions:
        if completer := completers.get(action.dest):
            action.completer = completer  # type: ignore[attr-defined]  # argcomplete's attribute


def _values(option: Any) -> Callable[..., Iterable[str]] | None:
    values = _CHOICES.get(option.name, ("on", "off") if option.parse is flag else None)
    return (lambda **_: values) if values else None


def _commands(prefix: str, parsed_args: argparse.Namespace, **_: object) -> Iterable[str]:
    """Programs of PATH for the first word; files for others, or if it is a path."""
    from argcomplete.completers import FilesCompleter  # the extra

    if parsed_args.argv or "/" in prefix:
        return list(FilesCompleter()(prefix))
    found = set()
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        if os.path.isdir(directory):
            found |= {name for name in os.listdir(directory) if name.startswith(prefix)}
    return found


def _pythons(prefix: str, **_: object) -> Iterable[str]:
    """Processes that have an interpreter."""
    if sys.platform != "linux":
        return ()
    from page_primer.processes import is_python  # needs the core

    pids = [name for name in os.listdir("/proc") if name.isdigit() and name.startswith(prefix)]
    return [pid for pid in pids if is_python(int(pid)) and int(pid) != os.getpid()]


def _users(**_: object) -> Iterable[str]:
    import pwd  # not on Windows

    return [entry.pw_name for entry in pwd.getpwall()]
