"""What a server is measured with: `off`, sets of prime()'s options, aligned code."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from page_primer.options import BY_NAME, SWITCH, TABLE, Options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

OFF = "off"
DEFAULT = "off,mlock,code,code+heap"
# The options of prime(); None: it is not called.
KNOWN: dict[str, dict[str, str] | None] = {
    OFF: None,
    "mlock": {"remap": "0"},
    "code": {},
    "code+heap": {"heap": "auto"},
    "aligned": None,
    "vmtouch": None,
}
_NAME = re.compile(r"[\w+.-]+")


@dataclass(frozen=True)
class Variant:
    """One way to run the server; `options` as in PAGE_PRIMER_*, None where it is not primed."""

    name: str
    options: Mapping[str, str] | None = None
    aligned: bool = False
    vmtouch: bool = False

    @property
    def primed(self) -> bool:
        return self.options is not None

    @property
    def locks_alone(self) -> bool:
        """Whether it locks the files' own pages, which all processes have, and does no more."""
        if self.options is None:
            return self.vmtouch
        options = Options.load(dict(self.options), {})
        return options.mlock and not options.remap

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs the server so."""
        if not self.primed:
            return list(command)
        return [sys.executable, *_RUN, *command]

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment to run it in: whatever the user's has, and the options."""
        found = {name: value for name, value in environ.items() if name != SWITCH}
        if self.options is None:
            # Also for a server that calls prime() itself.
            return {**found, SWITCH: "0"}
        return {**found, **{BY_NAME[name].variable: self.options[name] for name in self.options}}


# The command `page-primer` need not be on PATH, nor be this installation's.
_RUN = ("-m", "page_primer", "run", "--")


def parse(text: str) -> list[Variant]:
    """Read a list of variants: `off,code,mine:limit=128M:mlock=off,aligned:heap=all`. One that is
    not named `off` and has nothing after its name must be a known one; options come on top of the
    known one of that name, or of the defaults.

    Raises:
        ValueError: a name or an option that does not exist, or a name twice; the message has it.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    found = [_variant(word) for word in words]
    names = [variant.name for variant in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--variants: {name} is there twice; write `{name}2:...` for another")
    if not found or found[0].name != OFF:
        found = [Variant(OFF), *(variant for variant in found if variant.name != OFF)]
    if len(found) < 2:
        raise ValueError("--variants: there is nothing to compare `off` with")
    return found


def _variant(word: str) -> Variant:
    name, *settings = word.split(":")
    base = re.sub(r"(\d+|-.*)$", "", name)  # `off2` and `off-again` are another `off`
    if not _NAME.fullmatch(name) or (base not in KNOWN and not settings):
        raise ValueError(f"--variants: {name!r} is none of {', '.join(KNOWN)}, and has no options "
                         "(`NAME:option=value`)")  # fmt: skip
    options = KNOWN.get(base, {})
    if settings:
        options = dict(options or {})
    for setting in settings:
        option, equals, value = setting.partition("=")
        if option not in BY_NAME or not equals:
            known = ", ".join(row.name for row in TABLE)
            raise ValueError(f"--variants: {name}: {setting!r} is no option=value of {known}")
        assert options is not None
        options[option] = value.replace(";", ",")
        Options.load({option: options[option]}, {})
    if base == OFF and options is not None:
        raise ValueError(f"--variants: {name} has no options: it is not primed")
    return Variant(name, options, aligned=base == "aligned", vmtouch=base == "vmtouch")


def check_environment(environ: Mapping[str, str] = os.environ) -> None:
    """The options that the environment has, which concern every primed variant, must be valid.

    Raises:
        ValueError: one is not.
    """
    Options.load({}, environ)
