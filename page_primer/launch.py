"""`page-primer run`: start a command so that every Python process it leads to is primed.

Nothing is left behind of the launcher: it sets the environment and executes the command in its own
place. launcher.c does the same where it has nothing to find out, in a millisecond.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
from collections.abc import Collection, Mapping, Sequence

from page_primer.options import Options, flag
from page_primer.started import LATE, NATIVE, SITE, STARTED, VERBOSE, undo_coercion
from page_primer.suppress import suppress


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
    _restore_signals(environment.pop("PAGE_PRIMER_IGNORED", "").split())
    undo_coercion(environment)
    try:
        if options.enabled:
            _add_site(environment)
        if options.enabled and native and sys.platform == "linux":
            reason = _native(command, options, environment, launcher)
            if explicit:
                _say(f"not started natively: {reason}")
        _execute(command, environment)
    except OSError as error:
        _say(f"{command[0]}: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError | NotADirectoryError) else 126
    return 126


def _say(what: str) -> None:
    with suppress(OSError):
        if sys.stderr is not None:
            print(f"page-primer: {what}", file=sys.stderr, flush=True)


def _restore_signals(ignored: Collection[str]) -> None:
    """This interpreter ignores signals that it may have found otherwise."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        if number.name not in ignored:
            signal.signal(number, signal.SIG_DFL)


def _execute(command: Sequence[str], environment: dict[str, str]) -> None:
    """As execvp(3) does: a script without `#!` is the shell's. Raises OSError."""
    if not command[0]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    try:
        os.execvpe(command[0], list(command), environment)
    except OSError as error:
        if error.errno != errno.ENOEXEC:
            raise
        path = command[0] if "/" in command[0] else shutil.which(command[0])
        shell = ["/bin/sh", path or command[0], *command[1:]]
        os.execve(shell[0], shell, environment)


def _add_site(environment: dict[str, str]) -> None:
    """Put our sitecustomize first on PYTHONPATH, once."""
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path != SITE]
    environment["PYTHONPATH"] = os.pathsep.join([SITE, *paths] if paths != [""] else [SITE])


def _native(
    command: Sequence[str], options: Options, environment: dict[str, str], launcher: str | None
) -> str:
    """Execute the command natively. Returns only if that cannot be: the reason."""
    try:
        from page_primer import starts
    except ImportError as error:  # built without its C core
        return f"not available here: {error}"
    if launcher is not None:
        starts.introduce(launcher, SITE, options)
    try:
        found = starts.resolve(command)
        start = starts.plan(found.program, options)
        if starts.is_isolated(found.arguments):
            return "an interpreter with -E, -I or -S is not primed"
        environment = {**environment, STARTED: f"{os.getpid()} {found.name}"}
        start.run(found.program, found.arguments, environment)
    except starts.Refusal as why:
        return str(why)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # whatever it is, the command is executed
        return f"{type(error).__name__}: {error}"
    return ""
