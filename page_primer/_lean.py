"""Immutable records, tuples with names, `suppress`, and whose an exception is, without imports.

The first dataclass of a process takes 7 ms (it imports inspect) and each further one half a
millisecond, since its methods are compiled; these take hundredths. Short-lived commands under
`page-primer run` feel it: everything that prime() needs in a process imports nothing else for it.
For the same reason it imports `_struct`, of which the module struct is the public name: 0.3 ms.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from types import FrameType, TracebackType
    from typing import Any, ClassVar, TypeVar
    from typing import NamedTuple as NamedTuple

    from typing_extensions import dataclass_transform

    Some = TypeVar("Some", bound="Record")
    Error = TypeVar("Error", bound=BaseException)
else:
    import _signal  # built in: the module signal imports enum

    def dataclass_transform(**_):
        return lambda cls: cls


set_attribute = object.__setattr__


@dataclass_transform(frozen_default=True)
class Record:
    """A record whose fields are the annotations of its class, with their defaults.

    class Point(Record, aside=("name",)):
        x: int
        y: int = 0
        name: str = ""

    Fields that are put `aside` have no part in equality, hash and repr.
    """

    _fields: ClassVar[tuple[str, ...]] = ()
    _required: ClassVar[tuple[str, ...]]
    _compared: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, aside: tuple[str, ...] = ()) -> None:
        # Tuples, and one where they are alike: a set of five names takes a kilobyte.
        cls._fields = fields = (*cls._fields, *cls.__annotations__)
        required = tuple(name for name in fields if not hasattr(cls, name))
        cls._required = fields if required == fields else required
        cls._compared = tuple(name for name in fields if name not in aside) if aside else fields

    def __init__(self, *values: Any, **named: Any) -> None:
        # Attributes are set one by one: then their names are the class's, and a record takes half
        # of what it takes with a dictionary of its own (CPython 3.11 and newer).
        if not named and len(values) == len(self._fields):
            for name, value in zip(self._fields, values, strict=False):
                set_attribute(self, name, value)
            return
        given = dict(zip(self._fields, values, strict=False), **named)
        # A default stays what it is, an attribute of the class.
        complete = len(given) == len(self._fields) or all(name in given for name in self._required)
        known = all(name in self._fields for name in given)
        if not complete or not known or len(given) < len(values) + len(named):
            raise TypeError(f"{type(self).__name__}() takes {', '.join(self._fields)}")
        for name in given:
            set_attribute(self, name, given[name])

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable")

    def __eq__(self, other: object) -> bool:
        return self is other or (
            type(self) is type(other)
            and all(getattr(self, name) == getattr(other, name) for name in self._compared)
        )

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in self._compared))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._compared)
        return f"{type(self).__name__}({fields})"


if not TYPE_CHECKING:
    try:
        from _collections import _tuplegetter as _item
    except ImportError:  # another Python than CPython

        def _item(index, doc):
            return property(lambda self: self[index], doc=doc)

    class NamedTuple(tuple):
        """typing.NamedTuple without defaults: typing and collections take milliseconds."""

        def __init_subclass__(cls):
            cls._fields = tuple(cls.__annotations__)
            for index, name in enumerate(cls._fields):
                setattr(cls, name, _item(index, None))

        def __new__(cls, *values, **named):
            if named:
                rest = cls._fields[len(values) :]
                values += tuple(named.pop(name) for name in rest if name in named)
            if named or len(values) != len(cls._fields):
                raise TypeError(f"{cls.__name__}() takes {', '.join(cls._fields)}")
            return tuple.__new__(cls, values)

        _make = classmethod(tuple.__new__)

        def __getnewargs__(self):
            return tuple(self)

        def _replace(self, /, **changes):
            made = self._make([changes.pop(*item) for item in zip(self._fields, self, strict=True)])
            if changes:
                raise ValueError(f"no fields of {type(self).__name__}: {', '.join(changes)}")
            return made

        def __repr__(self):
            pairs = zip(self._fields, self, strict=True)
            return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in pairs)})"


if TYPE_CHECKING:
    from functools import cached_property

    cached = cached_property
else:

    class cached:  # noqa: N801  # as the one that it stands for
        """functools.cached_property, without functools."""

        def __init__(self, compute):
            self._compute, self._name = compute, compute.__name__

        def __get__(self, record, _):
            value = record.__dict__[self._name] = self._compute(record)
            return value


def replace(record: Some, /, **changes: Any) -> Some:
    """A copy with other values for some fields."""
    values = {name: getattr(record, name) for name in record._fields}
    return type(record)(**{**values, **changes})


def asdict(value: Any) -> Any:
    """Plain data of a record, and of the records in it."""
    if isinstance(value, Record):
        return {name: asdict(getattr(value, name)) for name in value._fields}
    if isinstance(value, tuple):
        return tuple(asdict(item) for item in value)
    return dict(value) if isinstance(value, dict) else value


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
        return value is not None and isinstance(value, self._exceptions) and is_ours(value)


_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


def is_ours(error: BaseException) -> bool:
    """Whether an exception comes of this package's own work, so that it becomes an outcome: a
    signal handler of the host, which may run in the midst of it, is other people's code, and what
    it raises is for them. What the kernel refuses is ours, also where other people have wrapped
    open(), and so is what an audit hook or a wrapper refuses, which was asked by us.

    Its frames tell, and of what another thread has had raised here, which has none
    (PyThreadState_SetAsyncExc(), as time limits of jobs do), its class: other people's are theirs.
    """
    if not _is_known(type(error)):
        return False
    ours, asked, inside = True, True, False
    trace, before = error.__traceback__, None
    while trace is not None:  # on to where it was raised
        frame = trace.tb_frame
        file = frame.f_code.co_filename
        if file.startswith(_HERE):
            ours = inside = True
        elif inside and not file.startswith("<frozen "):
            if _interrupted(before, frame):
                return False
            ours = ours and file.startswith(_LIBRARY) and "site-packages" not in file
            # A function's own locals tell what it was given; Cython's frames, made up, have none.
            asked = asked and bool(frame.f_code.co_flags & _NEW_LOCALS)
        trace, before = trace.tb_next, frame
    refused = isinstance(error, OSError) and error.errno is not None
    return ours or ((asked or refused) and not isinstance(error, TimeoutError))


def let_go(error: BaseException) -> None:
    """Have an exception hold nothing that this package's functions had in their hands: whoever
    catches it may keep it for long, with its frames."""
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is None or id(one) in seen:  # whoever sets them may make a circle
            continue
        seen.add(id(one))
        left += one.__context__, one.__cause__  # it came while these were dealt with
        trace = one.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(_HERE):
                with suppress(RuntimeError):  # one that is still executed
                    trace.tb_frame.clear()
            trace = trace.tb_next


_NEW_LOCALS = 2  # inspect.CO_NEWLOCALS
_FUNCTION: Any = type(is_ours)
_METHOD: Any = type(suppress().__enter__)


def _is_known(kind: type[BaseException]) -> bool:
    """Whether a class is Python's own, or of this package."""
    room = kind.__module__.partition(".")[0]
    if room == "builtins":  # also said of a class that exec() made without a module's name
        # Not by getattr(): this name is a new string each time, and Python's cache of attributes
        # would keep thousands.
        return vars(builtins).get(kind.__name__) is kind
    return room == "page_primer" or room in sys.stdlib_module_names


def _interrupted(frame: FrameType | None, by: FrameType) -> bool:
    """Whether a frame is a signal handler's or a trace function's: it was given the other one, or
    its code, or is known to the signal module, since a handler may forget what it was given."""
    # By identity: what else is in there may be equal to nothing, or ask the host's code.
    values = [*by.f_locals.values()]
    values += [item for value in values if type(value) is tuple for item in value]
    given = (frame, frame and frame.f_code)
    if any(value is one for value in values for one in given):
        return True
    for number in range(1, _signal.NSIG):
        handler: Any = _signal.getsignal(number)
        if not callable(handler):
            continue
        function = handler.__func__ if type(handler) is _METHOD else handler
        if type(function) is _FUNCTION and function.__code__ is by.f_code:
            return True
        if any(value is handler for value in values):  # an object that can be called
            return True
    return False


def ours(*kinds: type[Error]) -> tuple[type[Error], ...]:
    """For `except ours(OSError):`, which leaves alone what a host's signal handler raises: a time
    limit's TimeoutError is an OSError, too."""
    error = sys.exc_info()[1]
    return kinds if isinstance(error, kinds) and is_ours(error) else ()
