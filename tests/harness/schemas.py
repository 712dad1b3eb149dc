"""What page-primer writes as JSON, held against the schema that it publishes."""

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from page_primer import schema


def published(name: str) -> dict[str, Any]:
    """What `python -m page_primer.schema NAME` prints; a valid schema."""
    import jsonschema  # a test without it still sees the data, see validated()

    done = subprocess.run(
        [sys.executable, "-m", "page_primer.schema", name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == schema.build(name)
    jsonschema.Draft202012Validator.check_schema(found)
    return found


def validated(name: str, said: Any) -> Any:
    """The data, that the schema is for: it accepts it, and not without any one of its names."""
    try:
        import jsonschema  # of the extra `test`; what wheel-check runs does without
    except ImportError:
        return said
    checked = jsonschema.Draft202012Validator(published(name))
    checked.validate(said)
    for key, less in _lessened(said):
        assert list(checked.iter_errors(less)), f"{name}: valid without {key}"
    return said


def _lessened(said: Any) -> Iterator[tuple[str, Any]]:
    """The data without one name of its first object, one after the other."""
    for key in said[0] if isinstance(said, list) else said:
        less = copy.deepcopy(said)
        del (less[0] if isinstance(less, list) else less)[key]
        yield key, less
