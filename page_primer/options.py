"""What the caller wants: from keyword arguments, the environment, or a mapping."""

# Longer: it has a row and a field for each option.

from __future__ import annotations

import os

from page_primer._lean import Record, suppress
from page_primer._loading import Loading, is_cut_off

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Literal, TypedDict

    Mlock = Literal["all", "code"]
    HeapMode = Literal["auto", "arenas", "all"]

    class OptionValues(TypedDict, total=False):
        """The keyword arguments of `page_primer.prime()`."""

        remap: bool
        mlock: Mlock | bool
        backing: str
        merge: bool
        keep_profilers: bool
        perf_map: bool
        include: Iterable[str] | str | None
        exclude: Iterable[str] | str | None
        limit: int | str
        private_limit: int | str
        memory_share: float | str
        image_dir: str | os.PathLike[str] | None
        store_limit: int | str
        heap: HeapMode | bool
        heap_min_memory: int | str
        heap_unshare: bool
        freeze: bool


IN_PLACE = "in_place"
HEAP_MODES = ("auto", "arenas", "all")
BACKINGS = ("auto", IN_PLACE, "image", "memfd", "anonymous", "hugetlb")

# Room for an interpreter, OpenSSL, a database driver and an array library or two. What a web
# worker touches is far less; what exceeds this is one framework of hundreds of megabytes, whose
# user should decide.
DEFAULT_LIMIT = 64 << 20

# The hottest chunks of a few libraries, for each process that has them at an address of its own.
DEFAULT_PRIVATE_LIMIT = 8 << 20

# All that a web worker has mapped fits a container of 128 MiB, and the interpreter one of 64 MiB;
# three quarters of what is there stay for the application to grow into.
DEFAULT_MEMORY_SHARE = 0.25

# Images of an interpreter or two, and of what `limit` lets an application move, with their symbols.
DEFAULT_STORE_LIMIT = 256 << 20

# A huge page counts whole when one byte of it is touched, which a process of some ten megabytes in
# a small container should not have to pay. (Others' heap on huge pages by default had containers
# killed that were sized to the megabyte.)
DEFAULT_HEAP_MIN_MEMORY = 256 << 20

SWITCH = "PAGE_PRIMER"  # the off switch; and how every variable begins
# Of the launcher, of integrations and of `page-primer align`, which are no options of prime().
OTHER_VARIABLES = (
    "PAGE_PRIMER_LATE",
    "PAGE_PRIMER_VERBOSE",
    "PAGE_PRIMER_ALIGNED",
    "PAGE_PRIMER_APP",
    "PAGE_PRIMER_GUNICORN_CONF",
)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class Options(Record, aside=("explicit",)):
    """Validated options; TABLE below says what each one means.

    `explicit` names those that somebody set, by argument or environment: a shortfall in what was
    asked for is a warning, in what was merely tried it is not.
    """

    enabled: bool = True
    remap: bool = True
    mlock: Mlock | Literal[False] = "all"
    backing: str = "auto"
    merge: bool = True
    keep_profilers: bool = True
    perf_map: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int = DEFAULT_LIMIT
    private_limit: int = DEFAULT_PRIVATE_LIMIT
    memory_share: float = DEFAULT_MEMORY_SHARE
    image_dir: str | None = None
    store_limit: int = DEFAULT_STORE_LIMIT
    heap: HeapMode | Literal[False] = False
    heap_min_memory: int = DEFAULT_HEAP_MIN_MEMORY
    heap_unshare: bool = False
    freeze: bool = False
    explicit: frozenset[str] = frozenset()

    @classmethod
    def load(
        cls, values: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
    ) -> Options:
        """Merge `values` over the environment's `PAGE_PRIMER_*` over the defaults, and validate.

        The off switch `PAGE_PRIMER=0` is the operator's and is not overridden by `values`.

        Raises:
            TypeError: an unknown option in `values`, or one of the wrong type.
            ValueError: a value that does not make sense; the message names the option or variable.
        """
        found: dict[str, Any] = {}
        for option in TABLE:
            if environ.get(option.variable, "") != "":
                found[option.name] = option.parse(option.variable, environ[option.variable])
        for name, value in (values or {}).items():
            if name not in BY_NAME:
                known = ", ".join(sorted(BY_NAME))
                raise TypeError(f"unknown page-primer option {name!r}: known are {known}")
            found[name] = BY_NAME[name].parse(name, value)
        enabled = flag(SWITCH, environ.get(SWITCH) or True)
        return cls(enabled=enabled, explicit=frozenset(found), **found)

    @property
    def named(self) -> tuple[str, ...]:
        """Those that somebody asked for, and that may come to nothing."""
        names = ("backing", "heap", "image_dir", "mlock", "remap")
        return tuple(name for name in names if name in self.explicit and getattr(self, name))

    def as_dict(self) -> dict[str, Any]:
        """The options as plain data, for reports and logs."""
        return {name: getattr(self, name) for name in ("enabled", *NAMES)}


def _truth(value: Any) -> bool | None:
    text = str(value).strip().lower() if isinstance(value, str | int) else ""
    return text in _TRUE if text in _TRUE + _FALSE else None


def flag(name: str, value: Any) -> bool:
    truth = _truth(value)
    if truth is None:
        raise ValueError(f"{name} must be true or false (1/0, yes/no, on/off), not {value!r}")
    return truth


def _mlock(name: str, value: Any) -> str | bool:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in ("all", "code"):
        return text
    truth = _truth(value)
    if truth is None:
        raise ValueError(f'{name} must be "all" (or true), "code" or false, not {value!r}')
    return truth and "all"


def _heap(name: str, value: Any) -> str | bool:
    text = value.strip().lower() if isinstance(value, str) else ""
    if text in HEAP_MODES:
        return text
    truth = _truth(value)
    if truth is None:
        raise ValueError(
            f'{name} must be "auto" (or true), "arenas", "all" or false, not {value!r}'
        )
    return truth and "auto"


def _backing(name: str, value: Any) -> str:
    if value not in BACKINGS:
        raise ValueError(f"{name} must be one of {', '.join(BACKINGS)}, not {value!r}")
    return str(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = value.split(",")
    if not hasattr(value, "__iter__") or isinstance(value, bytes):
        raise TypeError(f"{name} must be a list of file name patterns, not {value!r}")
    patterns = list(value)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name} must be a list of file name patterns, not {value!r}")
    return tuple(pattern.strip() for pattern in patterns if pattern.strip())


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, str):
        text = value.strip().upper().removesuffix("B").removesuffix("I")
        number, unit = text.rstrip("KMG"), text.lstrip("0123456789")
        sane = number.isascii() and number.isdigit() and len(number) < 20
        if sane and unit in _UNITS:
            value = int(number) * _UNITS[unit]
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(
            f"{name} must be a number of bytes, such as 67108864 or 64M, not {value!r}"
        )
    return value


def _share(name: str, value: Any) -> float:
    number = float("nan")
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            number = float(value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be a number above 0 and up to 1, not {value!r}")
    return number


def _directory(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, not {value!r}")
    path = os.fspath(value)
    if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
        raise ValueError(f"{name} must be an absolute path, not {path!r}")
    return path.rstrip("/") or "/"


class Option(Record):
    """How one option is given and what it means: what prime()'s docstring, docs/options.md and the
    command line say of it."""

    name: str  # of the keyword argument
    parse: Callable[[str, Any], Any]  # from the name to blame, and a value; else raises ValueError
    default: str  # in words; the value is Options'
    help: str

    @property
    def value(self) -> str:
        """What its value is, for a command line's help."""
        return _VALUES.get(self.parse) or self.name.upper()

    @property
    def variable(self) -> str:
        return f"{SWITCH}_{self.name.upper()}"

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"


_VALUES: dict[Any, str] = {  # in help, by what parses it
    flag: "on|off", _mlock: "all|code|off", _backing: "BACKING", _patterns: "PATTERNS",
    _bytes: "SIZE", _share: "SHARE", _directory: "DIRECTORY", _heap: "auto|arenas|all|off",
}  # fmt: skip

TABLE = (
    Option("remap", flag, "on", "move code onto huge pages"),
    Option(
        "mlock", _mlock, "all",
        "lock what ELF objects have mapped, the hottest code first: `all` of it (or true), the "
        "`code` alone, or off (false)",
    ),
    Option(
        "backing", _backing, "auto",
        "where code is moved to: `in_place`, `image`, `memfd`, `anonymous`, `hugetlb`, or `auto` "
        "for the first of the first four that works",
    ),
    Option(
        "merge", flag, "on",
        "let read-only data share a huge page with code and so become executable, as it was in "
        "every binary before `-z separate-code`; off: only ranges of one protection are moved",
    ),
    Option(
        "keep_profilers", flag, "on",
        "leave on the original file what profilers look for there, or map anchors to it (small "
        "files beside the images) where that is enough",
    ),
    Option(
        "perf_map", flag, "off",
        "write `/tmp/perf-PID.map` with the symbols of code in memory without a file's name, "
        "for perf",
    ),
    Option(
        "include", _patterns, "all",
        "only objects whose path or file name matches one of these fnmatch patterns "
        "(`libpython*,*/numpy/*`)",
    ),
    Option(
        "exclude", _patterns, "none",
        "no objects whose path or file name matches one of these fnmatch patterns",
    ),
    Option(
        "limit", _bytes, "64M",
        "bytes to copy at most for objects other than the interpreter, the hottest first; `64M` "
        "works too",
    ),
    Option(
        "private_limit", _bytes, "8M",
        "the same for objects at a random load address (overlayfs, without `page-primer align`), "
        "whose copies other processes can hardly share",
    ),
    Option(
        "memory_share", _share, "0.25",
        "of the memory that is available to this process (of the machine, and within the limits "
        "of its memory cgroups), the share that copies and locks may take at most: above 0, up "
        "to 1",
    ),
    Option(
        "image_dir", _directory, "automatic",
        "absolute path of the directory for images; by default the first that gives huge pages",
    ),
    Option(
        "store_limit", _bytes, "256M",
        "bytes that the directory for images may take; the longest unused are removed first",
    ),
    Option(
        "heap", _heap, "off",
        "have the heap on huge pages, too: pymalloc's `arenas`; `auto` (or true): these "
        "and malloc's `[heap]`; `all`: large blocks as well; or off (false)",
    ),
    Option(
        "heap_min_memory", _bytes, "256M",
        "bytes; with a smaller memory limit (a cgroup's, or the machine's memory) the "
        "heap is left alone",
    ),
    Option(
        "heap_unshare", flag, "off",
        "collapse in a forked child what it shares with its parent as well, and so copy "
        "it",
    ),
    Option(
        "freeze", flag, "off",
        "call `gc.collect()` and `gc.freeze()` once in a process that is about to fork, "
        "so that its children share the heap for longer",
    ),
)  # fmt: skip

BY_NAME = {option.name: option for option in TABLE}
NAMES = tuple(BY_NAME)


def unknown_variables(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The variables that are named like ours and are none, which somebody may have misspelt.

    Those that Kubernetes sets in every pod for a service called page-primer are not among them.
    """
    ours = [name for name in environ if name.startswith(f"{SWITCH}_")]
    return tuple(
        name
        for name in sorted(ours)
        if name.removeprefix(f"{SWITCH}_").lower() not in BY_NAME
        and name not in OTHER_VARIABLES
        and not name.startswith((f"{SWITCH}_SERVICE_", f"{SWITCH}_PORT"))
    )


def nearest_variable(name: str) -> str | None:
    """The variable that a misspelt one may have been meant for."""
    if is_cut_off():
        return None
    with Loading():
        import difflib  # which a start without such a mistake does not need: 3 ms

    # Without what all have in common, which would make any two alike.
    known = {
        variable.removeprefix(SWITCH): variable
        for variable in (*(option.variable for option in TABLE), *OTHER_VARIABLES)
    }
    found = difflib.get_close_matches(name.removeprefix(SWITCH), known, 1, 0.75)
    return known[found[0]] if found else None
