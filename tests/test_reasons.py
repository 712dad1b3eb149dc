"""Reasons are one enumeration, which the documentation and the doctor know."""

import re
from pathlib import Path

from page_primer import reasons, schema
from page_primer.doctor.remedies import REMEDIES

ROOT = Path(__file__).parents[1]


def documented():
    """Reason -> what to do, as docs/reasons.md has it."""
    rows = re.findall(
        r"^\| `([^|`]+)` \| .* \| (.*) ?\|$", (ROOT / "docs/reasons.md").read_text(), re.M
    )
    return dict(rows)


def test_each_is_there_once():
    every = reasons.every()
    assert len(set(every)) == len(every) > 20
    for reason in every:
        assert type(reason) is reasons.Reason
        assert reason == str(reason)


def test_the_documentation_has_each_and_no_other():
    assert list(documented()) == list(reasons.every())


def test_the_documentation_has_the_doctors_remedies():
    for reason, remedy in REMEDIES.items():
        assert remedy in documented()[reason].replace("`", "")


def test_the_schema_has_them():
    found = schema.build()["properties"]
    every = {"enum": list(reasons.every())}
    assert every in found["reason"]["anyOf"]
    segments = found["objects"]["items"]["properties"]["segments"]["items"]
    assert segments["properties"]["left"]["propertyNames"] == every


def test_reasons_are_written_nowhere_else():
    """Who compares with one, or gives one, takes the constant. (`align` has words of its own.)"""
    for file in (ROOT / "page_primer").rglob("*.py"):
        if file.name != "reasons.py" and file.parent.name != "align":
            text = file.read_text()
            assert [reason for reason in reasons.every() if f'"{reason}"' in text] == [], file


def test_a_refusal_for_people():
    assert str(reasons.Refusal(reasons.SEALED)) == "sealed"
    assert str(reasons.Refusal(reasons.NOT_SUPPORTED, "darwin")) == "not supported here: darwin"
