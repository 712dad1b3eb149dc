"""Frames of a stack, as the tools name them."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["NATIVE", "PYTHON", "Frame", "base"]

NATIVE, PYTHON = "native", "Python"


@dataclass(frozen=True)
class Frame:
    """A frame as a tool names it, innermost last or first as the tool has it. `where` is the source
    file and line, or the object's name where the tool knows no more."""

    kind: str
    name: str
    where: str


def base(path: str) -> str:
    return os.path.basename(path)
