"""A gunicorn configuration that primes, and otherwise is the user's own.

    gunicorn -c python:page_primer.integrations.gunicorn_conf app:app

gunicorn reads one configuration file only, so this one reads ./gunicorn.conf.py in its turn (or the
file, `file:PATH` or `python:MODULE` that PAGE_PRIMER_GUNICORN_CONF names), takes over all of its
settings and calls its hooks before ours. A configuration file may instead say::

    from page_primer.integrations.gunicorn_conf import *

`python -m page_primer.integrations.gunicorn_conf` prints the path of this file, for gunicorn's
`-c PATH`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import gunicorn
from gunicorn.config import make_settings

import page_primer
from page_primer.integrations import gunicorn as _gunicorn
from page_primer.integrations import versions
from page_primer.options import Options

# A gunicorn that does not know some of them ignores them.
__all__ = [
    "dirty_worker_init",
    "on_dirty_starting",
    "on_reload",
    "on_starting",
    "post_fork",
    "post_worker_init",
]

_VARIABLE = "PAGE_PRIMER_GUNICORN_CONF"
_DEFAULT = "gunicorn.conf.py"


def _loaded_by_gunicorn() -> bool:
    """Whether gunicorn itself is loading this file as its configuration, and not a configuration
    file of the user's that imports it."""
    if __name__ == "__config__":  # -c PATH
        return True
    frame = sys._getframe(1)
    while frame is not None and (
        frame.f_globals.get("__name__") in (__name__, "importlib", "importlib._bootstrap")
        or frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and str(frame.f_globals.get("__name__")).startswith("gunicorn.")


def _user_settings() -> dict[str, Any]:
    """The names that the user's configuration defines; none where there is no such file."""
    location = os.environ.get(_VARIABLE, "")
    if location.startswith("python:"):
        with _errors_as_gunicorn_says_them(location):
            return vars(importlib.import_module(location.removeprefix("python:")))
    path = location.removeprefix("file:") or os.path.join(os.getcwd(), _DEFAULT)
    if not os.path.exists(path):
        if location:
            sys.exit(f"page-primer: {_VARIABLE} names {path!r}, which does not exist")
        return {}
    spec = importlib.util.spec_from_file_location("__page_primer_user_config__", path)
    if spec is None or spec.loader is None:
        sys.exit(f"page-primer: {_VARIABLE} names {path!r}, which is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _errors_as_gunicorn_says_them(path):
        # Always from its source: bytecode is taken for current by the second and the size, and a
        # reload may follow an edit at once.
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec"), vars(module))
    return vars(module)


@contextlib.contextmanager
def _errors_as_gunicorn_says_them(location: str) -> Iterator[None]:
    """Of a module, gunicorn would print the error's text alone, without the file and line."""
    try:
        yield
    except Exception:
        print(f"Failed to read config file: {location}", file=sys.stderr)
        traceback.print_exc()
        sys.exit(1)


def _chain(name: str, ours: Callable[..., None], theirs: Any) -> Callable[..., None]:
    """Call the user's hook and then ours.

    The user's is held to what gunicorn asks of it: a callable with so many parameters, or the name
    of one, "package.module.function". Ours has as many."""
    setting = make_settings()[name]
    try:
        setting.set(theirs)
    except TypeError as error:
        sys.exit(f"page-primer: invalid value for {name}: {error}")
    theirs = setting.get()
    if theirs is ours or getattr(theirs, "__module__", "") == _gunicorn.__name__:
        return ours

    def one(process: Any) -> None:
        theirs(process)
        ours(process)

    def two(server: Any, worker: Any) -> None:
        theirs(server, worker)
        ours(server, worker)

    return two if name == "post_fork" else one


def on_starting(server: Any) -> None:
    _reread_next_time()
    _gunicorn.on_starting(server)


def on_reload(server: Any) -> None:
    _reread_next_time()
    _gunicorn.on_reload(server)


post_fork = _gunicorn.post_fork
post_worker_init = _gunicorn.post_worker_init
on_dirty_starting = _gunicorn.on_dirty_starting
dirty_worker_init = _gunicorn.dirty_worker_init


def _reread_next_time() -> None:
    """Let a HUP read the configuration anew: of python:MODULE gunicorn would get this module from
    the import system's cache, and never look at the user's file again."""
    sys.modules.pop("page_primer.integrations.gunicorn_conf", None)


def _take_over(theirs: dict[str, Any]) -> dict[str, Any]:
    """The user's settings, all that gunicorn looks at, with their hooks and ours chained."""
    names = make_settings().keys()
    settings = {name: value for name, value in theirs.items() if name in names}
    for name in __all__:
        if name in settings:
            settings[name] = _chain(name, globals()[name], settings[name])
    return settings


try:
    versions.require("gunicorn", gunicorn.__version__)
    _options = Options.load()
except ValueError as error:
    sys.exit(f"page-primer: {error}")

if _options.heap:  # before an application is preloaded
    page_primer.on_process(lambda process: process.start_heap(_options))

if _loaded_by_gunicorn():
    globals().update(_take_over(_user_settings()))

if __name__ == "__main__":
    print(os.path.abspath(__file__))
