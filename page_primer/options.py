"""What the caller wants: from keyword arguments, the environment, or a mapping."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from page_primer.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypedDict

    class OptionValues(TypedDict, total=False):
        """The keyword arguments of `page_primer.prime()`."""

        remap: bool
        mlock: bool
        backing: str
        merge: bool
        keep_profilers: bool
        perf_map: bool
        include: Iterable[str] | str | None
        exclude: Iterable[str] | str | None
        limit: int | str
        image_dir: str | os.PathLike[str] | None


BACKINGS = ("auto", "image", "memfd", "anonymous", "hugetlb")

# Room for an interpreter, OpenSSL, a database driver and an array library or two. What a web
# worker touches is far less; what exceeds this is one framework of hundreds of megabytes, whose
# user should decide.
DEFAULT_LIMIT = 64 << 20

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


class Options(Record, aside=("explicit",)):
    """Validated options; see the README's table for what each one means.

    `explicit` names those that somebody set, by argument or environment: a shortfall in what was
    asked for is a warning, in what was merely tried it is not.
    """

    enabled: bool = True
    remap: bool = True
    mlock: bool = True
    backing: str = "auto"
    merge: bool = True
    keep_profilers: bool = True
    perf_map: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int = DEFAULT_LIMIT
    image_dir: str | None = None
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
        for name in _PARSERS:
            variable = f"PAGE_PRIMER_{name.upper()}"
            if environ.get(variable, "") != "":
                found[name] = _PARSERS[name](variable, environ[variable])
        for name, value in (values or {}).items():
            if name not in _PARSERS:
                known = ", ".join(sorted(_PARSERS))
                raise TypeError(f"unknown page-primer option {name!r}: known are {known}")
            found[name] = _PARSERS[name](name, value)
        enabled = flag("PAGE_PRIMER", environ.get("PAGE_PRIMER") or True)
        return cls(enabled=enabled, explicit=frozenset(found), **found)

    def as_dict(self) -> dict[str, Any]:
        """The options as plain data, for reports and logs."""
        return {name: getattr(self, name) for name in ("enabled", *NAMES)}


def flag(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if isinstance(value, str | int) and text in _TRUE + _FALSE:
        return text in _TRUE
    raise ValueError(f"{name} must be true or false (1/0, yes/no, on/off), not {value!r}")


def _backing(name: str, value: Any) -> str:
    if value not in BACKINGS:
        raise ValueError(f"{name} must be one of {', '.join(BACKINGS)}, not {value!r}")
    return str(value)


def _patterns(name: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        value = value.split(",")
    if not isinstance(value, Iterable) or isinstance(value, bytes):
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


def _directory(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path, not {value!r}")
    path = os.fspath(value)
    if not isinstance(path, str) or not os.path.isabs(path) or "\0" in path:
        raise ValueError(f"{name} must be an absolute path, not {path!r}")
    return path.rstrip("/") or "/"


_PARSERS = {
    "remap": flag,
    "mlock": flag,
    "backing": _backing,
    "merge": flag,
    "keep_profilers": flag,
    "perf_map": flag,
    "include": _patterns,
    "exclude": _patterns,
    "limit": _bytes,
    "image_dir": _directory,
}

NAMES = tuple(_PARSERS)
