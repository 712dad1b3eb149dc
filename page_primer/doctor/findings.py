"""The outcome of one examination, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass

STATUSES = OK, INFO, WARNING, PROBLEM = "ok", "info", "warning", "problem"


@dataclass(frozen=True)
class Check:
    """One thing examined. `fix` is the line that mends it: a command, a flag, a unit's setting."""

    name: str
    status: str  # "ok", "info", "warning" or "problem"
    found: str
    fix: str | None = None
