"""How a command can be started natively: the interpreter it leads to, the image to start it from,
and why not where not.

What was found out is kept in a *start record* beside the images, one for each interpreter, for the
next process to read instead of finding out again. It holds as long as the files it names are what
they were:

    <store>/.starts/<identity of the interpreter's file>

    page-primer 1               the format
    exec | preload | no         how: the image in the program's place, or LD_PRELOAD of a library's
    /path/of/image              or the reason for "no"
    device-inode-size           of the image, hexadecimal
    /path/of/library            of the library that the image is of, or -
    identity of the library     or -
    offset length               what of the image is to be on huge pages, hexadecimal

An identity is device-inode-size-mtime-ctime, times in nanoseconds. An image has no times, since
they tell its last use. launcher.c reads the same.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence

from page_primer import _core, backing, elf, image, native, smaps, store
from page_primer.backing import Refused
from page_primer.options import Options
from page_primer.plan import EXCLUDED, selects
from page_primer.record import Record
from page_primer.scratch import map_new
from page_primer.suppress import suppress
from page_primer.survey import pmd_size

_FORMAT = "page-primer 1"
_FOLDER = ".starts"
_RECORDS = 64  # that stay in a store
_NO_HOLDS = 600  # seconds: what cannot be done now may be possible later
_PYTHON = re.compile(r"python(\d(\.\d+)?[a-z]*)?")
_LIBRARY = re.compile(r"libpython\d\.\d+\w*\.so")
_VERSION = re.compile(r"(?:lib)?python(\d+)\.(\d+)([a-z]*)")
# As the kernel reads it: up to the end of the file or of the line, without spaces and tabs around.
_INTERPRETER_LINE = re.compile(rb"#![ \t]*([^ \t\n\0]+)(?:[ \t]+([^\n\0]*?))?[ \t]*\n?")
_LISTED = re.compile(r"^\s*(\S+) => (/.+) \(0x[0-9a-f]+\)$", re.MULTILINE)


class Refusal(Exception):
    """An interpreter that cannot be started natively; the message is the reason, in one line."""


class Command(Record):
    """A command as the kernel would run it: the program, `#!` lines followed, and its argv."""

    program: str
    arguments: tuple[str, ...]
    name: str  # of the process, as the kernel would set it


class Start(Record):
    """How to start an interpreter natively."""

    image: str
    library: str | None  # the library that the image is of, to be preloaded; None: of the program
    offset: int  # in the image, of what is to be on huge pages
    length: int  # bytes

    def run(
        self, program: str, arguments: Sequence[str] | Sequence[bytes], environment: dict[str, str]
    ) -> None:
        """Replace this process. Raises OSError; what was set in `environment` is for the new
        process alone."""
        path = self.image
        if self.library is not None:
            # Last, so that others still come before the library, as without us.
            others = environment.get("LD_PRELOAD")
            environment["LD_PRELOAD"] = f"{others}:{self.image}" if others else self.image
            path = program
        os.execve(path, list(map(os.fsencode, arguments)), environment)


def resolve(arguments: Sequence[str]) -> Command:
    """Follow a command to the program that runs it, as execvp(3), the kernel and env(1) do.

    Raises:
        OSError: there is no such command, or it may not be executed.
    """
    program = _find(arguments[0])
    name = os.path.basename(program)
    rest = tuple(arguments)
    for _ in range(4):  # as deep as the kernel goes
        with open(program, "rb") as file:
            line = file.readline(256)
        found = _INTERPRETER_LINE.fullmatch(line)
        if found is None or len(line) == 256 > line.find(b"\n") + 1:  # cut off
            break
        words = [os.fsdecode(word) for word in found.groups() if word]
        rest = (*words, program, *rest[1:])
        program = words[0]
        if len(words) == 2 and os.path.basename(program) == "env":
            if not re.fullmatch(r"[^-=\s][^=\s]*", words[1]):
                break
            program, rest = _find(words[1]), rest[1:]
            name = os.path.basename(program)
    return Command(program, rest, name)


def _find(name: str) -> str:
    """The file that execvp(3) would execute: an empty entry of PATH is the current directory."""
    path = os.environ.get("PATH", os.defpath)
    places = [""] if "/" in name else path.split(":")
    why = errno.ENOENT
    for found in [os.path.join(place, name) for place in places if name]:
        with suppress(OSError):
            regular = stat.S_ISREG(os.stat(found).st_mode)
            if regular and os.access(found, os.X_OK):
                return found
            why = errno.EACCES
    raise OSError(why, os.strerror(why), name)


def is_isolated(arguments: Sequence[str]) -> bool:
    """Whether an interpreter's options (-E, -I, -S) keep it from importing our sitecustomize, which
    puts right what starting it natively leaves behind: LD_PRELOAD, and the process's name."""
    words = iter(arguments[1:])
    for word in words:
        if not word.startswith("-") or word in ("-", "--"):
            return False
        if word == "--check-hash-based-pycs":
            next(words, None)
        for at, letter in enumerate("" if word.startswith("--") else word[1:], 2):
            if letter in "EIS":
                return True
            if letter in "cm":
                return False
            if letter in "WX":  # the rest is its argument, or the next word
                if at == len(word):
                    next(words, None)
                break
    return False


def plan(program: str, options: Options) -> Start:
    """How to start an interpreter natively, from its record or by writing its image.

    Raises:
        Refusal: it cannot be; also kept in a record.
        OSError: the program cannot be read.
    """
    # It follows no exec unless told to, which nothing here shows; the loader's listing is its own.
    if "/vgpreload_" in os.environ.get("LD_PRELOAD", ""):
        raise Refusal("valgrind runs the program")
    unwanted = _unwanted(options)
    if unwanted:
        raise Refusal(unwanted)
    start = _plan(program, options)
    if not selects(options, start.library or os.path.realpath(program)):
        raise Refusal(EXCLUDED)
    return start


def _plan(program: str, options: Options) -> Start:
    """The same, whatever the options include and exclude, which is nothing for a record."""
    status = os.stat(program)
    name = _identity(status)
    places = backing.directories(options)
    stores = [path for path, _ in places]
    for path in _record_places(options):
        with suppress(OSError, ValueError):
            found = _read(path, name)
            if isinstance(found, Refusal) and path in stores:
                raise found
            if isinstance(found, Start) and _store_of(found) in stores and _is_huge(found):
                return found
    try:
        start = _prepare(program, status, places)
    except Refusal as why:
        _keep(stores, name, _record_of(why))
        raise
    if start.library is None or "LD_LIBRARY_PATH" not in os.environ:  # else not others' library
        _keep([_store_of(start), *_record_places(options)], name, _record_of(start))
    return start


def _record_places(options: Options) -> list[str]:
    """Where records may be: a directory that was named may be one of root's, with images only."""
    named = [path for path, _ in backing.directories(options)]
    return named + store.candidates() if options.image_dir is not None else named


def _store_of(start: Start) -> str:
    return os.path.dirname(os.path.dirname(start.image))


def _unwanted(options: Options) -> str | None:
    """What the options say against it."""
    if not options.remap:
        return "remap is off"
    if not options.merge:
        return "merge is off"
    if options.backing not in ("auto", "image"):
        return f"backing is {options.backing}"
    # As this process is, not the interpreter: nothing for a record.
    if os.geteuid() != os.getuid() or os.getegid() != os.getgid():
        return "setuid process"
    if _core.thp_disabled():
        return "huge pages are disabled for this process (PR_SET_THP_DISABLE)"
    return None


def _prepare(program: str, status: os.stat_result, places: Sequence[backing.Place]) -> Start:
    pmd = pmd_size()
    if not pmd:
        raise Refusal("no huge pages on this kernel")
    _require_plain(program, status)
    path, library = interpreter(program)
    if backing.kernel() < (5, 10):
        raise Refusal("Linux before 5.10 does not align programs")
    with open(library or path, "rb") as file:
        try:
            layout = native.lay_out(library or path, file.fileno(), pmd)
        except image.CannotLayOut as error:
            raise Refusal(f"{os.path.basename(library or path)}: {error}") from error
        notes = []
        for directory, reason in places:
            if reason:
                notes.append(f"{directory}: {reason}")
                continue
            if library and re.search(r"[\s:$]", directory):
                notes.append(f"{directory}: not a name for LD_PRELOAD")
                continue
            try:
                with store.Store(directory) as opened:
                    return _write(opened, layout, file.fileno(), library)
            except (store.Unusable, Refusal) as error:
                notes.append(f"{directory}: {error}")
            except OSError as error:
                notes.append(f"{directory}: {backing.reason_of(error)}")
    raise Refusal("; ".join(notes) or "no directory for images")


def interpreter(program: str) -> tuple[str, str | None]:
    """The file of an interpreter, symbolic links followed, and of its libpython if it has one.

    Raises:
        Refusal: it is no interpreter that can be started natively.
        OSError: it cannot be read.
    """
    path = os.path.realpath(program)
    try:
        with open(path, "rb") as file:
            return path, _library(path, elf.File(file.fileno()))
    except elf.Malformed:
        raise Refusal(f"{path} is not a Python interpreter") from None


def _write(
    opened: store.Store, layout: native.NativeLayout, original: int, library: str | None
) -> Start:
    """Have the image in a store, with the right content, on huge pages."""
    if os.statvfs(opened.path).f_flag & os.ST_NOEXEC:
        raise Refusal("mounted noexec")
    why = "no huge pages"
    for fresh in (False, True):
        for attempt in backing.from_store(opened, layout, fresh):
            if isinstance(attempt, Refused):
                why = attempt.reason
                continue
            try:
                assert attempt.image is not None
                if attempt.huge < attempt.wanted:
                    continue
                if not attempt.written and not image.holds(layout, original, attempt.image.fd):
                    why = "wrong content"
                    break
                if attempt.written:
                    os.fsync(attempt.image.fd)  # it will be believed without being compared
                return _start(attempt.image.path, layout, library)
            finally:
                attempt.discard()
    raise Refusal(why)


def _start(path: str, layout: native.NativeLayout, library: str | None) -> Start:
    (region,) = layout.regions
    low, high = region.huge(layout.pmd)
    return Start(path, library, layout.offset(low), high - low)


def _require_plain(path: str, status: os.stat_result) -> None:
    """What the kernel gives to a program for its file's sake it would not give to the image."""
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise Refusal("setuid or setgid program")
    with suppress(OSError):
        if os.getxattr(path, "security.capability"):
            raise Refusal("program with file capabilities")


def _library(path: str, file: elf.File) -> str | None:
    """The libpython of an interpreter; None where the interpreter is the program itself."""
    headers = list(elf.PROGRAM_HEADER.iter_unpack(file.program_headers()))
    loader = next(
        (file.read(h[2], h[5]).rstrip(b"\0") for h in headers if h[0] == elf.PT_INTERP), b""
    )
    needed = file.dynamic_strings().get(elf.DT_NEEDED, [])
    wanted = next((name for name in needed if _LIBRARY.match(os.path.basename(name))), None)
    # A program that embeds Python may keep LD_PRELOAD for those that it starts.
    if not _PYTHON.fullmatch(os.path.basename(path)):
        raise Refusal(f"{path} is not a Python interpreter")
    _require_supported(wanted or os.path.basename(path))
    try:
        native.require_own_kind(file)
    except image.CannotLayOut as error:
        raise Refusal(f"{os.path.basename(path)}: {error}") from None
    if b"musl" in loader:
        raise Refusal("musl's loader does not align segments")
    if wanted is None:
        return None
    # The program's own loader says which file it would load.
    glibc = _glibc()
    if glibc < (2, 35):
        raise Refusal(f"glibc {'.'.join(map(str, glibc))} does not align segments; 2.35 does")
    answer = subprocess.run(
        [path], env={**os.environ, "LD_TRACE_LOADED_OBJECTS": "1"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
    ).stdout  # fmt: skip
    found = dict(_LISTED.findall(os.fsdecode(answer))).get(wanted)
    if found is None:
        raise Refusal(f"{wanted} is not found by the loader")
    with open(found, "rb") as opened:
        if elf.File(opened.fileno()).dynamic_strings().get(elf.DT_SONAME) != [wanted]:
            raise Refusal(f"{wanted} has another SONAME")
    return os.path.realpath(str(found))


def _require_supported(name: str) -> None:
    """One that will not import started.py would keep LD_PRELOAD, and pass it on."""
    version = _VERSION.match(name)
    if version and (int(version[1]), int(version[2])) < (3, 10):
        raise Refusal(f"{name} is older than CPython 3.10")
    if version and version[3].startswith("t"):
        raise Refusal(f"{name} is free-threaded")


def _glibc() -> tuple[int, ...]:
    """The version of this process's glibc; (0,) for another libc."""
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        text = ""
    found = re.match(r"glibc (\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else (0,)


# ----------------------------------------------------------------------------------- records ---


def _identity(status: os.stat_result) -> str:
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{number:x}" for number in numbers)


def _image_identity(status: os.stat_result) -> str:
    return "-".join(_identity(status).split("-")[:3])


def _record_of(found: Start | Refusal) -> str:
    if isinstance(found, Refusal):
        lines = [_FORMAT, "no", str(found).replace("\n", " "), "-", "-", "-", "0 0"]
    else:
        library = found.library
        lines = [
            _FORMAT,
            "preload" if library else "exec",
            found.image,
            _image_identity(os.stat(found.image)),
            library or "-",
            _identity(os.stat(library)) if library else "-",
            f"{found.offset:x} {found.length:x}",
        ]
    return "\n".join(lines) + "\n"


def _read(directory: str, name: str) -> Start | Refusal | None:
    """What a record says, if it is ours and still true. Raises OSError or ValueError where there
    is none to read."""
    folder = f"{directory}/{_FOLDER}"
    # Whoever can write there can put another's file, of another meaning, in a record's place.
    if not store.is_trusted(os.stat(directory)) or not store.is_trusted(os.lstat(folder)):
        return None
    fd = os.open(f"{folder}/{name}", store.FILE)
    with open(fd, encoding="utf-8", errors="surrogateescape") as file:
        status = os.fstat(fd)
        if not store.is_trusted(status) or not stat.S_ISREG(status.st_mode):
            return None
        form, how, what, identity, library, library_identity, extent = file.read(1 << 16).split(
            "\n"
        )[:7]
    if form != _FORMAT:
        return None
    if how == "no":
        return Refusal(what) if 0 <= time.time() - status.st_mtime < _NO_HOLDS else None
    there = os.stat(what)
    if _image_identity(there) != identity or not store.is_trusted(there):
        return None
    # With a search path of its own this process may be given another library.
    if how == "preload" and (
        "LD_LIBRARY_PATH" in os.environ or _identity(os.stat(library)) != library_identity
    ):
        return None
    offset, length = (int(number, 16) for number in extent.split())
    return Start(what, library if how == "preload" else None, offset, length)


def _keep(directories: Sequence[str], name: str, text: str) -> None:
    """Write a record into the first directory that takes it; without one the next process finds
    out again."""
    for directory in directories:
        folder = f"{directory}/{_FOLDER}"
        draft = f"{folder}/{name}.{os.getpid()}"
        try:
            with store.Store(directory):  # ours alone, or not to be written to
                with suppress(FileExistsError):
                    os.mkdir(folder, 0o755)
                fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
                with open(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                    file.write(text)
                os.replace(draft, f"{folder}/{name}")
                _prune(folder)
            return
        except (store.Unusable, OSError):
            with suppress(OSError):
                os.unlink(draft)


def introduce(launcher: str, site: str, options: Options) -> None:
    """Tell launcher.c, which is at a path, where the directory with our sitecustomize is."""
    with suppress(OSError):
        name = f"launcher-{_identity(os.stat(launcher))}"
        places = _record_places(options)
        if not any(os.path.exists(f"{path}/{_FOLDER}/{name}") for path in places):
            _keep(places, name, site + "\n")


def _prune(folder: str) -> None:
    by_age = sorted(_aged(folder), reverse=True)
    for _, path in by_age[_RECORDS:]:
        with suppress(OSError):
            os.unlink(path)


def _aged(folder: str) -> Iterator[tuple[float, str]]:
    for entry in os.scandir(folder):
        with suppress(OSError):
            yield entry.stat(follow_symlinks=False).st_mtime, entry.path


def _is_huge(start: Start) -> bool:
    """Have the image's pages in memory as huge ones, as a mapping of it will find them. They are
    not when memory was short, or the machine was started anew: then they are read again here, with
    advice, before anybody reads them without."""
    pmd = pmd_size()
    fd = os.open(start.image, os.O_RDONLY | os.O_CLOEXEC)
    protection = _core.PROT_READ | _core.PROT_EXEC
    page = os.sysconf("SC_PAGESIZE")
    try:
        address = map_new(
            start.length, pmd, 0, protection, _core.MAP_PRIVATE, fd, start.offset, guard=page
        )
        try:
            backing.bring_in(address, start.length, pmd)
            return sum(m.huge for m in smaps.starting_at({address})) == start.length
        finally:
            _core.unmap(address, start.length + page)
    finally:
        os.close(fd)
