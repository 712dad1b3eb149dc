"""The one table of frameworks' versions: noxfile.py reads it, pyproject.toml and README.md agree
with it by a test, and an older framework is told so."""

from __future__ import annotations

# The oldest that works, and the newest tested.
TESTED = {
    "gunicorn": ("21.2.0", "27.0"),
    "uvicorn": ("0.30.0", "0.54"),
    "celery": ("5.4.0", "5.7"),
}


def require(framework: str, version: str) -> None:
    """Refuse what is older than the oldest; a version that says nothing of its age passes.

    Raises:
        ValueError: it is too old; the message is one line.
    """
    oldest = TESTED[framework][0]
    found = _numbers(version)
    if found and found < _numbers(oldest):
        raise ValueError(
            f"{framework} {version} is too old: page-primer requires {oldest} or newer"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor; empty if there are none."""
    words = version.split(".")[:2]
    return tuple(map(int, words)) if len(words) == 2 and all(map(str.isdigit, words)) else ()
