"""Marks that several files of tests have. Programs that tests start import the harness, not this:
pytest takes half a second, and brings 20 shared libraries to be primed."""

import pytest

__all__ = ["needs_root"]

needs_root = pytest.mark.root("drop capabilities or change ids")
