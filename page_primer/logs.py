"""One line in a server's log, with fields for programs beside its text (docs/logging.md)."""

from __future__ import annotations

from page_primer._lean import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging
    from collections.abc import Callable
    from typing import Any, Protocol, TypeAlias

    class Logger(Protocol):
        """What `Report.log()` needs: logging.Logger has it, and so has gunicorn's logger. Fields
        are passed by the keyword `extra`, to those that take it."""

        def debug(self, msg: str, *args: Any) -> Any: ...
        def info(self, msg: str, *args: Any) -> Any: ...
        def warning(self, msg: str, *args: Any) -> Any: ...

    AnyLogger: TypeAlias = Logger | logging.Logger

PREFIX = "page_primer_"  # of each field: attributes of log records have one name space

# What lines are about, the field `event`.
EVENTS = (
    "primed", "nothing_done", "unchanged", "detail", "heap",
    "lock_shortfall", "memory_shortfall", "huge_shortfall", "no_longer_aligned",
    "unknown_variables", "freeze_suggested", "figures_not_exported", "small_memory_limit",
)  # fmt: skip


class Shortfall(Record):
    """Something that was asked for, or that this machine could give, and was not obtained."""

    event: str
    text: str  # with the remedy
    fields: dict[str, Any]


def say(method: Callable[..., Any], event: str, line: str, /, **fields: object) -> None:
    """Write a line by a method of a logger, with its fields as attributes of the record."""
    extra = {PREFIX + name: value for name, value in {"event": event, **fields}.items()}
    try:
        method("page-primer: %s", line, extra=extra)
    except TypeError:  # somebody's own logger, without that argument
        method("page-primer: %s", line)
