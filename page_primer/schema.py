"""The JSON schemas of what page-primer writes: python -m page_primer.schema [NAME] prints one.

Built from the records themselves, so that they are those of the installed version.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Callable
from typing import Any, get_args, get_origin, is_typeddict

from page_primer import build as build_command
from page_primer import health, report
from page_primer._lean import Record
from page_primer.align import command as align
from page_primer.bench.intervals import Ratio
from page_primer.cli import images
from page_primer.doctor import coverage, findings
from page_primer.kernel.anonymous import Use
from page_primer.kernel.memory import Memory
from page_primer.outcome import HeapReport, SegmentReport
from page_primer.processes import SUMS, ProcessStatus
from page_primer.reasons import Reason, every

# What annotations name, and their own modules import for type checkers alone.
_NAMES = {
    "Memory": Memory,
    "HeapReport": HeapReport,
    "SegmentReport": SegmentReport,
    "Use": Use,
    "Reason": Reason,
}
_PROBED = ("pages", "small_ns", "huge_ns", "ratio")
_PLAIN = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}

Schema = dict[str, Any]


def build(name: str = "report") -> Schema:
    """A schema, as plain data; sizes and addresses are in bytes.

    Args:
        name: a key of SCHEMAS.
    """
    description, make = SCHEMAS[name]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"page-primer {name}",
        "description": f"{description}; sizes are in bytes.",
        **make(),
    }


def _report() -> Schema:
    return _with(_of(report.Report), dict.fromkeys(report.TOTALS, _of(int)))


def _status() -> Schema:
    more = {"unlocked": _of(str | None), "primed": _of(bool), **dict.fromkeys(SUMS, _of(int))}
    return _list(_with(_of(ProcessStatus), more))


def _doctor() -> Schema:
    check = _of(findings.Check)
    check["properties"]["status"] = {"enum": list(findings.STATUSES)}
    check["properties"]["code"] = {"enum": [*findings.CODES, None]}
    return _object({"checks": _list(check), "interpreter": _of(coverage.Interpreter | None)})


def _build() -> Schema:
    built, left = _of(build_command.Built), _of(build_command.Left)
    return _object({"path": _of(str), "built": _list(built), "left": _list(left)})


def _bench() -> Schema:
    numbers = _of(dict[str, float])  # by name, as docs/bench.md has them
    settings = {
        "requests": int, "connections": int, "rounds": int | None, "minutes": float | None,
        "variants": str, "seed": int, "urls": list[str],
    }  # fmt: skip
    machine = {
        "system": str, "processor": str, "cores": int, "virtual": bool, "memory": int,
        "transparent_hugepage": str, "multi_gen_lru": str, "governor": str,
    }  # fmt: skip
    variant = _object({"medians": numbers, "obtained": numbers})
    compared = {"verdict": _of(str), "ratios": _of(dict[str, Ratio])}
    variant["properties"].update(compared)  # not of `off`, which the others are compared to
    variant["dependentRequired"] = {"verdict": ["ratios"], "ratios": ["verdict"]}
    plain = {
        "page_primer": str, "command": list[str], "server": list[str], "began": str, "python": str,
        "no_counters": str | None, "generator": str, "ended": str | None, "left_out": list[str],
        "side_by_side": bool,
    }  # fmt: skip
    return _object({
        **_each(plain),
        "settings": _object(_each(settings)),
        "machine": _object(_each(machine)),
        "tlb_probe": _list(_object(_each(dict.fromkeys(_PROBED, float)))),
        "variants": {"type": "object", "additionalProperties": variant},
        "rounds": _list({"type": "object", "additionalProperties": numbers}),
    })  # fmt: skip


SCHEMAS: dict[str, tuple[str, Callable[[], Schema]]] = {
    "report": ("What page_primer.prime() did for a process", _report),
    "health": (
        "What page_primer.status() says of its own process, where it can",
        lambda: _of(health.Status),
    ),
    "status": ("What `page-primer status --json` says, a process each", _status),
    "doctor": ("What `page-primer doctor --json` found", _doctor),
    "images": (
        "What `page-primer images --json` lists, a store each",
        lambda: _list(_of(images.Listing)),
    ),
    "align": (
        "What `page-primer align --json` did or found, a file each",
        lambda: _list(_of(align.Row)),
    ),
    "build": ("What `page-primer build --json` wrote", _build),
    "bench": ("What `page-primer bench --json FILE` measured", _bench),
}


def _of(kind: Any) -> Schema:
    """The schema of values of a type, as as_dict() and json.dumps() render them."""
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if kind is Reason:
        return {"enum": list(every())}
    if isinstance(kind, type) and issubclass(kind, Record):
        return _object({name: _of(_type_of(kind, name)) for name in kind._fields})
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
        return _object({name: _of(_type_of(kind, name)) for name in names})
    if is_typeddict(kind):
        return _object({name: _of(_type_of(kind, name)) for name in kind.__annotations__})
    if isinstance(kind, types.UnionType):
        return {"anyOf": [_of(one) for one in get_args(kind)]}
    if get_origin(kind) in (tuple, list):
        return _list(_of(get_args(kind)[0]))
    if get_origin(kind) is dict:
        keys, values = get_args(kind)
        return {
            "type": "object", "propertyNames": _of(keys), "additionalProperties": _of(values),
        }  # fmt: skip
    raise TypeError(f"no schema for {kind}")


def _object(properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _each(kinds: dict[str, Any]) -> Schema:
    return {name: _of(kind) for name, kind in kinds.items()}


def _with(found: Schema, more: Schema) -> Schema:
    return _object({**found["properties"], **more})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _type_of(record: Any, name: str) -> Any:
    # Annotations are strings; a record's own module has most of what they name.
    module = vars(sys.modules[record.__module__])
    written = record.__annotations__[name]
    text = getattr(written, "__forward_arg__", written)  # of a TypedDict
    return eval(text, {**module, **_NAMES})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m page_primer.schema", description="Print a JSON schema."
    )
    parser.add_argument("name", nargs="?", choices=SCHEMAS, default="report")
    print(json.dumps(build(parser.parse_args().name), indent=2))
