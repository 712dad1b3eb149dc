"""`page-primer run`: start a command so that every Python process it leads to is primed.

Sets the environment and executes the command in this process's place, as execvp(3) does. What
primes is site/sitecustomize.py, which the environment puts in the way of each interpreter's start.
"""

from __future__ import annotations

import errno
import os

from page_primer._lean import suppress
from page_primer.launcher.child import LATE, SITE, VERBOSE, say
from page_primer.launcher.warm import through_warm
from page_primer.options import Options, flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Iterator, Mapping, Sequence
    from typing import NoReturn
else:
    import _signal  # signal itself imports enum, which takes 2 ms

_IGNORED_BY_PYTHON = _signal.SIGPIPE, _signal.SIGXFSZ
# What execvp(3) takes for "not in this directory of PATH"; EACCES it remembers.
_NOT_HERE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT)
_DEFAULT_PATH = "/bin:/usr/bin"  # confstr(_CS_PATH): where execvp(3) looks without PATH


def run(command: Sequence[str], settings: Mapping[str, str]) -> int:
    """Execute a command in this process's place.

    Args:
        command: its argv.
        settings: environment variables, PAGE_PRIMER_*, for it and its descendants.

    Returns:
        The exit status that a shell gives where the command cannot be executed: 127 if there is
        none, 126 otherwise.

    Raises:
        ValueError: an invalid setting; the message names it.
    """
    # In place: execv(2) passes on what getenv(3) sees, entries that are no NAME=VALUE included.
    os.environ.update(settings)
    options = Options.load()
    for name in (LATE, VERBOSE):
        flag(name, os.environ.get(name) or False)
    _undo_coercion()
    if options.enabled:
        _add_site()
        if options.heap == "all":
            from page_primer.heap.malloc import add_tunable  # of this option alone

            add_tunable(os.environ)
    try:
        through = through_warm(command)
        if len(through) > len(command):
            # As without it, should it make a command line too long, or not to be encoded here.
            with suppress(OSError, ValueError):
                _execute(through, script=False)
        _execute(command)
    except OSError as error:
        say(f"page-primer: {command[0]}: {error.strerror}")
        return 126 if error.errno not in _NOT_HERE else 127


def _add_site() -> None:
    """Put our sitecustomize first on PYTHONPATH, once."""
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path != SITE]
    os.environ["PYTHONPATH"] = os.pathsep.join([SITE, *paths] if paths != [""] else [SITE])


def _undo_coercion() -> None:
    """An interpreter that finds the C locale sets LC_CTYPE (PEP 538), and the next one, which finds
    that, would not enable UTF-8 mode (PEP 540): pass on what this one was given."""
    if "UTF" not in os.environ.get("LC_CTYPE", "").upper():
        return
    with suppress(OSError), open("/proc/self/environ", "rb") as file:
        given = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
        if b"LC_CTYPE" not in given:
            del os.environ["LC_CTYPE"]
        else:
            os.environ["LC_CTYPE"] = os.fsdecode(given[b"LC_CTYPE"])


def _execute(command: Sequence[str], *, script: bool = True) -> NoReturn:
    """As execvp(3) does: a script without `#!` is the shell's, unless it can be none.

    Raises:
        OSError: the command cannot be executed.
    """
    refusal = OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    # This interpreter ignores them, and an ignored signal stays ignored over an exec. How it found
    # them is not recorded anywhere, so they get their defaults, as by subprocess.Popen. Not before
    # there is nothing left to do here: a closed pipe as stderr, or `ulimit -f 0`, would kill us.
    ignored = [(number, _signal.signal(number, _signal.SIG_DFL)) for number in _IGNORED_BY_PYTHON]
    try:
        for path in _candidates(command[0]):
            try:
                _execute_file(path, command, script=script)
            except OSError as error:
                if error.errno == errno.EACCES or refusal.errno != errno.EACCES:
                    refusal = error
                if error.errno not in (errno.EACCES, *_NOT_HERE):
                    break
    finally:
        for number, handler in ignored:
            _signal.signal(number, handler)
    raise refusal


def _candidates(name: str) -> Iterator[str]:
    if "/" in name:
        yield name
    elif name:
        for directory in os.environ.get("PATH", _DEFAULT_PATH).split(os.pathsep):
            yield f"{directory}/{name}" if directory else name


def _execute_file(path: str, command: Sequence[str], *, script: bool) -> NoReturn:
    try:
        os.execv(path, list(command))
    except OSError as error:
        if error.errno != errno.ENOEXEC or not script:
            raise
        os.execv("/bin/sh", ["/bin/sh", path, *command[1:]])
