"""What happens in each Python process that starts under `page-primer run`, before its own code.

Called by site/sitecustomize.py. A process that could have been started natively and was not (one
that another spawned, or a shell) starts again, from the image: nothing of its own has run yet. Then
it is primed like any other, and its children lock for themselves.
"""

from __future__ import annotations

import os
import sys

from page_primer import on_process, prime
from page_primer.elf import is_native
from page_primer.options import Options, flag
from page_primer.suppress import suppress

SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")
# "PID name" (or "PID/2 name"): this process was started from an image, by us (for the second time).
STARTED = "PAGE_PRIMER_STARTED"
NATIVE, LATE, VERBOSE = "PAGE_PRIMER_NATIVE", "PAGE_PRIMER_LATE", "PAGE_PRIMER_VERBOSE"


_started_here = False


def start() -> None:
    """Bring this process to the primed state. What goes wrong is said with PAGE_PRIMER_VERBOSE."""
    global _started_here
    if _started_here:  # another installation's launcher is on PYTHONPATH too
        return
    _started_here = True
    preloaded = _forget_preload()
    times = _times_started()
    options = Options.load()
    if not options.enabled:
        return
    reason = None
    if times and not preloaded and not _runs_image():
        reason = "the image was not loaded"
    elif not times:
        reason = _start_again(options)
    note = f"native load: {reason}" if reason else None
    on_process(lambda process: process.set_note(note))
    report = prime(options)
    # The image's pages went from memory after it was looked at, and came back as small ones.
    if times and _started_small():
        reason = _start_again(options, times) if times == 1 else "as after the first start"
        note = f"native load: on small pages; {reason}"
        report = on_process(lambda process: process.set_note(note))
    os.register_at_fork(after_in_child=_lock_in_child)
    if _wants(LATE, False):
        from page_primer import late

        late.watch(options)
    if _wants(VERBOSE, False) and sys.stderr is not None:
        print(f"page-primer[{os.getpid()}]: {report.summary()}", file=sys.stderr)
        if note:
            print(f"page-primer[{os.getpid()}]: {note}", file=sys.stderr)


def _wants(name: str, default: bool) -> bool:
    return flag(name, os.environ.get(name) or default)


def _forget_preload() -> bool:
    """Take the image out of LD_PRELOAD, which is for this process alone: in another program, or
    another Python, it would be in the way. Returns whether it was there."""
    entries = os.environ.get("LD_PRELOAD", "").split(":")
    others = [entry for entry in entries if not is_native(entry)]
    if len(others) == len(entries):
        return False
    if others:
        os.environ["LD_PRELOAD"] = ":".join(others)
    else:
        del os.environ["LD_PRELOAD"]
    return True


def _times_started() -> int:
    """How often this process was started by us already; then it gets its name back, which people
    look for with pgrep, and which is that of the file that was executed."""
    who, _, name = os.environ.pop(STARTED, "").partition(" ")
    pid, _, times = who.partition("/")
    if pid != str(os.getpid()):
        return 0
    if name:
        _write_name(name)
    return 2 if times else 1


def _write_name(name: str) -> None:
    with suppress(OSError), open("/proc/self/comm", "wb", buffering=0) as file:
        file.write(os.fsencode(name))


def _runs_image() -> bool:
    return is_native(os.readlink("/proc/self/exe"))


def _started_small() -> bool:
    # Not imported where prime() did not, for want of memory.
    apply = sys.modules.get("page_primer.apply")
    return apply is not None and apply.process.started_small


def _start_again(options: Options, times: int = 0) -> str | None:
    """Start this process natively, `times` after it was. Returns only if it cannot be: with the
    reason, or None where it was not wanted."""
    if not _wants(NATIVE, True) or sys.platform != "linux":
        return f"{NATIVE}=0" if NATIVE in os.environ else None
    try:
        own = os.readlink("/proc/self/exe")
        with open("/proc/self/cmdline", "rb", buffering=0) as file:
            arguments = file.readall()[:-1].split(b"\0")
        with open("/proc/self/comm", "rb", buffering=0) as file:
            name = os.fsdecode(file.readall()[:-1])
        # An interpreter inside another program is started as that program.
        program = os.path.realpath(sys.executable or "")
        if (program != own and not is_native(own)) or arguments != list(
            map(os.fsencode, sys.orig_argv)
        ):
            return "not an interpreter's own process"
        from page_primer import _core, starts

        names = [own, *(os.fsdecode(name) for name, _, _ in _core.objects()[2])]
        images = [_folder(name) for name in names if is_native(name)]
        if images and not times:
            return None  # it is: never start again what was started
        if _core.threads() > 1:
            return "threads were started before"
        if _others_came_first():
            return "another sitecustomize has run before"
        try:
            found = starts.plan(program, options)
        except starts.Refusal as why:
            return str(why)
        if images and _folder(found.image) not in images:
            return "the image is of another interpreter"
        count = f"/{times + 1}" if times else ""
        environment = {**os.environ, STARTED: f"{os.getpid()}{count} {name}"}
        undo_coercion(environment)
        found.run(program, arguments, environment)
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # whatever it is, the process runs on and is primed
        return f"{type(error).__name__}: {error}"
    return None


def _folder(image: str) -> str:
    """The name of an image's folder, which tells what it is of."""
    return os.path.basename(os.path.dirname(image))


def undo_coercion(environment: dict[str, str]) -> None:
    """An interpreter that finds the C locale sets LC_CTYPE (PEP 538), and the next one, which finds
    that, would do without UTF-8 mode (PEP 540): give it what this one was given."""
    if "UTF" not in environment.get("LC_CTYPE", "").upper():
        return
    with suppress(OSError), open("/proc/self/environ", "rb") as file:
        given = dict(entry.partition(b"=")[::2] for entry in file.read().split(b"\0"))
        if b"LC_CTYPE" not in given:
            del environment["LC_CTYPE"]
        else:
            environment["LC_CTYPE"] = os.fsdecode(given[b"LC_CTYPE"])


def _others_came_first() -> bool:
    """Whether a sitecustomize before ours on PYTHONPATH has run, as a tracer's does: what it did,
    it would do again."""
    for path in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if path == SITE:
            return False
        if any(os.path.exists(f"{path or '.'}/sitecustomize{end}") for end in (".py", ".pyc", "")):
            return True
    return False


def _lock_in_child() -> None:
    """A fork inherits no locks. Only locks: the child of a thread must not ask the loader."""
    try:
        on_process(lambda process: process.lock_in_child())
    except BaseException:  # a signal handler's: a fork hook has nobody to raise it to
        return
