"""`page-primer run`: start a command so that every Python process it leads to is primed.

Nothing is left behind of the launcher: it sets the environment and executes the command in its own
place. launcher.c does the same where it has nothing to find out, in a millisecond.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from page_primer.options import Options, flag
from page_primer.started import LATE, NATIVE, STARTED, VERBOSE, undo_coercion

SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")


def run(command: Sequence[str], settings: Mapping[str, str], *, explicit: bool = False) -> int:
    """Execute a command in this process's place.

    Args:
        command: its argv.
        settings: environment variables, PAGE_PRIMER_*, for it and its descendants.
        explicit: say on stderr why native load is not to be had.

    Returns:
        An exit status, as of a shell, if the command cannot be executed.

    Raises:
        ValueError: a setting that does not make sense; the message names it.
    """
    environment = {**os.environ, **settings}
    options = Options.load(environ=environment)
    flag(LATE, environment.get(LATE) or False)
    flag(VERBOSE, environment.get(VERBOSE) or False)
    native = flag(NATIVE, environment.get(NATIVE) or True)
    environment.pop(STARTED, None)
    launcher = environment.pop("PAGE_PRIMER_LAUNCHER", None)
    _restore_signals(environment.pop("PAGE_PRIMER_IGNORED", ""))
    undo_coercion(environment)
    try:
        if options.enabled:
            _add_site(environment)
        if options.enabled and native and sys.platform == "linux":
            reason = _native(command, options, environment, launcher)
            if explicit:
                print(f"page-primer: not started natively: {reason}", file=sys.stderr)
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        print(f"page-primer: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127 if isinstance(error, FileNotFoundError) else 126


def _restore_signals(ignored: str) -> None:
    """This interpreter ignores signals that it may have found otherwise."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        if name not in ignored.split():
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _add_site(environment: dict[str, str]) -> None:
    """Put our sitecustomize first on PYTHONPATH, once."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path != SITE]
    environment["PYTHONPATH"] = os.pathsep.join([SITE, *paths] if paths != [""] else [SITE])


def _native(
    command: Sequence[str], options: Options, environment: dict[str, str], launcher: str | None
) -> str:
    """Execute the command natively. Returns only if that cannot be: the reason. Raises OSError when
    there is no such command."""
    from page_primer import starts

    if launcher is not None:
        starts.introduce(launcher, SITE, options)
    found = starts.resolve(command)
    if not starts.looks_at_site(found.arguments):
        return "an interpreter with -E, -I or -S is not primed"
    try:
        start = starts.plan(found.program, options)
        environment = {**environment, STARTED: f"{os.getpid()} {found.name}"}
        start.run(found.program, found.arguments, environment)
    except starts.Refusal as why:
        return str(why)
    except OSError as error:
        return error.strerror or str(error)
    return ""
