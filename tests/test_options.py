"""Options: from arguments, the environment and defaults, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest

import page_primer
from page_primer.options import DEFAULT_LIMIT, Options


def test_defaults():
    options = Options.load({}, {})
    assert (options.enabled, options.remap, options.mlock, options.backing) == (
        True, True, "all", "auto",
    )  # fmt: skip
    assert (options.limit, options.explicit) == (DEFAULT_LIMIT, frozenset())


def test_environment_sets_and_arguments_win():
    environ = {
        "PAGE_PRIMER_REMAP": "no",
        "PAGE_PRIMER_MLOCK": "0",
        "PAGE_PRIMER_BACKING": "memfd",
        "PAGE_PRIMER_MERGE": "off",
        "PAGE_PRIMER_KEEP_PROFILERS": "FALSE",
        "PAGE_PRIMER_PERF_MAP": "1",
        "PAGE_PRIMER_INCLUDE": "libpython*, libssl*",
        "PAGE_PRIMER_EXCLUDE": "*/numpy/*",
        "PAGE_PRIMER_LIMIT": "12M",
        "PAGE_PRIMER_MEMORY_SHARE": "0.5",
        "PAGE_PRIMER_IMAGE_DIR": "/srv/images",
    }
    options = Options.load({"backing": "image", "mlock": True}, environ)
    assert options == Options(
        remap=False, mlock="all", backing="image", merge=False, keep_profilers=False,
        perf_map=True,
        include=("libpython*", "libssl*"), exclude=("*/numpy/*",), limit=12 << 20,
        memory_share=0.5, image_dir="/srv/images",
    )  # fmt: skip
    assert "limit" in options.explicit


def test_empty_variable_is_unset():
    assert Options.load({}, {"PAGE_PRIMER": "", "PAGE_PRIMER_LIMIT": ""}) == Options()


@pytest.mark.parametrize("value", ["0", "false", "No", "off"])
def test_off_switch_beats_arguments(value):
    assert not Options.load({"remap": True}, {"PAGE_PRIMER": value}).enabled


@pytest.mark.parametrize(
    ("value", "mlock"),
    [("all", "all"), (" Code ", "code"), (True, "all"), (1, "all"), ("on", "all"),
     (False, False), ("off", False), (0, False), ("No", False)],
)  # fmt: skip
def test_mlock_is_all_or_code_or_off(value, mlock):
    assert Options.load({"mlock": value}, {}).mlock == mlock
    assert Options.load({}, {"PAGE_PRIMER_MLOCK": str(value)}).mlock == mlock


@pytest.mark.parametrize("value", [1, 1.0, "1", 0.001, "0.5", " .25 "])
def test_shares(value):
    assert Options.load({"memory_share": value}, {}).memory_share == float(value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64k", 64 << 10), ("64M", 64 << 20), ("2G", 2 << 30),
     ("3MiB", 3 << 20), (" 7MB ", 7 << 20)],
)  # fmt: skip
def test_sizes(text, size):
    assert Options.load({"limit": text}, {}).limit == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", "12X"), ("limit", "M"), ("limit", "-1"), ("limit", -1), ("limit", True),
        ("limit", 1.5), ("limit", "1.5M"), ("limit", "٣"), ("backing", "tape"), ("backing", []),
        ("remap", "maybe"), ("remap", 2), ("mlock", None), ("image_dir", "images"),
        ("image_dir", "/a\0b"),
        ("limit", "9" * 5000), ("mlock", "some"), ("mlock", 2), ("mlock", ["code"]),
        ("memory_share", 0), ("memory_share", -0.5), ("memory_share", 1.01),
        ("memory_share", "25%"), ("memory_share", True), ("memory_share", None),
        ("memory_share", "nan"), ("memory_share", 10**400),
    ],
)  # fmt: skip
def test_bad_value_is_named_in_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be [^\n]*$"):
        Options.load({name: value}, {})


@pytest.mark.parametrize(
    ("name", "value"), [("include", 5), ("exclude", [b"x"]), ("image_dir", 7), ("include", b"x")]
)
def test_bad_type_is_named_in_one_line(name, value):
    with pytest.raises(TypeError, match=rf"^{name} must be [^\n]*$"):
        Options.load({name: value}, {})


def test_unknown_option_is_named():
    with pytest.raises(TypeError, match="unknown page-primer option 'bakcing'"):
        page_primer.prime(bakcing="auto")


def test_bad_variable_is_named():
    with pytest.raises(ValueError, match="PAGE_PRIMER_LIMIT must be"):
        Options.load({}, {"PAGE_PRIMER_LIMIT": "lots"})
    with pytest.raises(ValueError, match='PAGE_PRIMER_MLOCK must be "all"'):
        Options.load({}, {"PAGE_PRIMER_MLOCK": "rodata"})
    with pytest.raises(ValueError, match="PAGE_PRIMER_MEMORY_SHARE must be a number above 0"):
        Options.load({}, {"PAGE_PRIMER_MEMORY_SHARE": "0"})
    with pytest.raises(ValueError, match="PAGE_PRIMER must be true or false"):
        Options.load({}, {"PAGE_PRIMER": "perhaps"})


def test_import_starts_no_work_and_loads_no_framework():
    source = (
        "import sys, page_primer\n"
        "bad = {'gunicorn', 'uvicorn', 'celery', 'elftools', 'page_primer._core', 'rich'}\n"
        "print(sorted(bad & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_priming_imports_little(images):
    """What a launched process has not loaded yet, it need not load for being primed."""
    root = str(Path(page_primer.__file__).parents[1])
    source = (
        f"import sys; sys.path.append({root!r})\n"
        "import page_primer\n"
        f"assert page_primer.prime(image_dir={str(images)!r}).reason is None\n"
        "slow = {'dataclasses', 'elftools', 'inspect', 'logging', 're', 'typing'}\n"
        "print(sorted(slow & set(sys.modules)))\n"
    )
    for _ in ("first", "cached"):
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", source], capture_output=True, text=True
        )
        assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("platform", ["darwin", "win32", "freebsd14"])
def test_other_platforms_get_a_report(platform):
    source = (
        "import sys; sys.platform = %r\n"
        "import page_primer\n"
        "for report in page_primer.prime(), page_primer.restore(): print(report.reason)\n"
        % platform
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"not supported on {platform}"] * 2, done.stderr


def test_without_the_core_the_report_says_so():
    source = (
        "import sys; sys.modules['page_primer._core'] = None\n"
        "import page_primer; print(page_primer.prime().reason)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.startswith("not available here: "), done.stderr
