"""README and docs as data: their code blocks, inline code, links and headings."""

import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# What people read; CHANGELOG is about what was.
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]


class Block(NamedTuple):
    """A code block."""

    document: str  # its path, from the root of the project
    language: str  # of a fenced block; "" for one that is indented
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.document}: {self.lines[0]}"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks() -> list[Block]:
    """Of all documents."""
    return [block for path in DOCUMENTS for block in _blocks(path)]


def _blocks(path: Path) -> list[Block]:
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    indented = re.compile(r"(?:(?<=\n\n)|\A)(?:    .*\n|\n(?=    ))+")
    text, found = path.read_text(), []
    for one in fenced.finditer(text):
        found.append(Block(name_of(path), one[1], tuple(one[2].splitlines())))
    for part in indented.findall(fenced.sub("", text)):
        lines = tuple(line.removeprefix("    ") for line in part.strip("\n").splitlines())
        found.append(Block(name_of(path), "", lines))
    return found


def prose(path: Path) -> str:
    """A document without its code blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<=\n\n)(?:    .*\n|\n(?=    ))+", "", text)


def codes(path: Path) -> list[str]:
    """What stands in backticks."""
    spans = re.findall(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose(path), re.DOTALL)
    return [" ".join(code.split()) for _, code in spans]


def anchors(path: Path) -> set[str]:
    """Of its headings: as Python-Markdown makes them, and as hosting sites do."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]", "", title)).encode("ascii", "ignore")
        words = re.sub(r"[^\w\s-]", "", plain.decode()).strip().lower()
        found |= {re.sub(r"[-\s]+", "-", words), words.replace(" ", "-")}
    return found


def links(path: Path) -> list[str]:
    """Targets of its links and pictures."""
    return re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", prose(path)))
