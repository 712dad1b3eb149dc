"""contextlib.suppress without contextlib, which takes 2 ms to import: on the way to a primed
process nothing else of it is needed, and short commands feel it."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType


class suppress:  # noqa: N801  # as the one that it stands for
    """Leave the block at the first of the given exceptions, and go on behind it."""

    def __init__(self, *exceptions: type[BaseException]) -> None:
        self._exceptions = exceptions

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        return kind is not None and issubclass(kind, self._exceptions)
