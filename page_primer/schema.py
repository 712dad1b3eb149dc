"""The JSON schema of `Report.as_dict()`: python -m page_primer.schema prints it.

Built from the records themselves, so that it is that of the installed version.
"""

from __future__ import annotations

import json
import types
from typing import Any, get_args, get_origin

from page_primer import report
from page_primer._lean import Record
from page_primer.kernel.anonymous import Use
from page_primer.kernel.memory import Memory
from page_primer.outcome import HeapReport, SegmentReport
from page_primer.reasons import Reason, every

_NAMES = {
    "Memory": Memory,
    "HeapReport": HeapReport,
    "SegmentReport": SegmentReport,
    "Use": Use,
    "Reason": Reason,
}
_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def build() -> dict[str, Any]:
    """The schema, as plain data; sizes and addresses are in bytes."""
    found = _of(report.Report)
    for name in report.TOTALS:
        found["properties"][name] = _of(int)
    found["required"] += report.TOTALS
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "page-primer report",
        "description": "What page_primer.prime() did for a process; sizes are in bytes.",
        **found,
    }


def _of(kind: Any) -> dict[str, Any]:
    """The schema of values of a type, as as_dict() and json.dumps() render them."""
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind is Reason:
        return {"enum": list(every())}
    if isinstance(kind, type) and issubclass(kind, Record):
        return {
            "type": "object",
            "properties": {name: _of(_type_of(kind, name)) for name in kind._fields},
            "required": list(kind._fields),
            "additionalProperties": False,
        }
    if isinstance(kind, types.UnionType):
        return {"anyOf": [_of(one) for one in get_args(kind)]}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _of(get_args(kind)[0])}
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return {
            "type": "object", "propertyNames": _of(keys), "additionalProperties": _of(values),
        }  # fmt: skip
    raise TypeError(f"no schema for {kind}")


def _type_of(record: type[Record], name: str) -> Any:
    # Annotations are strings; what they name is imported for type checkers alone.
    return eval(record.__annotations__[name], {**vars(report), **_NAMES})


if __name__ == "__main__":
    print(json.dumps(build(), indent=2))
