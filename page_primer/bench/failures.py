"""What a run may fail of, each as one line for the user."""

from __future__ import annotations


class Failure(Exception):
    """The run cannot begin, or not go on; the message is the line."""


class CutShort(Exception):
    """One measurement came to nothing (the server died under load, requests failed): its round
    does not count. The message is the line."""
