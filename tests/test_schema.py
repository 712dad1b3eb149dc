"""The published schema of reports, held against those of real processes."""

import copy
import json
import subprocess
import sys
from typing import Any

import pytest
from harness.process import Process
from harness.schemas import published, validated

jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema (the extra `test`)")


@pytest.fixture(scope="module")
def validator():
    return jsonschema.Draft202012Validator(published("report"))


def test_primed(validator, python, images):
    with Process(python) as process:
        report = process.prime(image_dir=str(images))
    assert report["objects"]
    assert report["reason"] is None
    validator.validate(report)


def test_unprimed(validator, python):
    """Nothing moved and nothing locked; and a report of what restore() left."""
    with Process(python) as process:
        report = process.prime(remap=False, mlock=False)
        assert report["copied_bytes"] == 0
        validator.validate(report)
        validator.validate(process.restore())


@pytest.mark.parametrize(
    ("before", "environ", "reason"),
    [
        ("", {"PAGE_PRIMER": "0", "PAGE_PRIMER_LIMT": "1"}, "switched off"),
        ("sys.platform = 'darwin'", {}, "not supported here"),
        ("sys.modules['page_primer._core'] = None", {}, "not available here"),
    ],
)
def test_refused(validator, before, environ, reason):
    program = (
        f"import json, sys; {before}\n"
        "import page_primer; print(json.dumps(page_primer.prime().as_dict()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    assert report["reason"] == reason
    assert report["unknown_variables"] == [name for name in environ if "LIMT" in name]
    validator.validate(report)


def test_locks_that_were_refused(validator, python):
    with Process(python) as process:
        process.run("import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))")
        report = process.prime(remap=False)
    validator.validate(report)


def test_what_is_no_report_is_refused(validator, python):
    with Process(python) as process:
        report = process.prime(remap=False)
    validator.validate(report)
    for path, value in (
        (("pid",), "1"),
        (("objects", 0, "code_bytes"), None),
        (("objects", 0, "segments", 0, "left"), {"excluded": "many"}),
        (("objects", 0, "segments", 0, "left"), {"why": 1}),
        (("reason",), "why"),
        (("memory",), []),
        (("surplus",), 1),
        (("objects", 0, "surplus"), 1),
    ):
        wrong = copy.deepcopy(report)
        place: Any = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert list(validator.iter_errors(wrong)), path
    for name in report:
        assert list(validator.iter_errors({k: v for k, v in report.items() if k != name})), name


def said(name, *command, status=(0,)):
    """What a command says with --json, valid by its published schema."""
    done = subprocess.run(
        [sys.executable, "-m", "page_primer", *command, "--json"], capture_output=True, text=True
    )
    assert done.returncode in status, done.stderr
    return validated(name, json.loads(done.stdout))


@pytest.mark.slow
def test_status(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        assert said("status", "status", str(process.pid))[0]["primed"]
    assert said("status", "status", "1")[0]["pid"] == 1


def test_doctor():
    assert said("doctor", "doctor", status=(0, 1, 2))["interpreter"]


@pytest.mark.images
def test_images_and_build(tmp_path):
    """In a store that belongs to whoever runs this."""
    store = tmp_path / "store"
    if not said("build", "build", "--dir", str(store))["built"]:
        pytest.skip("nothing here has room for a huge page")
    (listed,) = said("images", "images", "--dir", str(store))
    assert listed["images"]


def test_align():
    rows = said("align", "align", "--check", sys.executable, "/etc/hostname", status=(0, 1))
    assert [row["named"] for row in rows] == [True, True]


def test_what_has_no_schema_is_named():
    done = subprocess.run(
        [sys.executable, "-m", "page_primer.schema", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "report" in done.stderr
