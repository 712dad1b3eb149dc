"""Options: from arguments, the environment and defaults, and what is refused."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import page_primer
from page_primer.options import (
    DEFAULT_LIMIT,
    OTHER_VARIABLES,
    TABLE,
    Options,
    unknown_variables,
)


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
        page_primer.prime(bakcing="auto")  # type: ignore[call-arg]


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
        "for report in page_primer.prime(), page_primer.restore(): print(report.summary())\n"
        % platform
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    said = f"nothing done: not supported here: {platform}"
    assert done.stdout.splitlines() == [said] * 2, done.stderr


def test_without_the_core_the_report_says_so():
    source = (
        "import sys; sys.modules['page_primer._core'] = None\n"
        "import page_primer; print(page_primer.prime().summary())"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.stdout.startswith("nothing done: not available here: "), done.stderr


# ------------------------------------------------------------------------- each described once

ROOT = Path(__file__).parents[1]


def words(text):
    return " ".join(text.split())


def test_the_table_has_the_options_that_there_are():
    fields = [name for name in Options._fields if name not in ("enabled", "explicit")]
    assert [option.name for option in TABLE] == fields
    source = (ROOT / "page_primer" / "options.py").read_text()  # for type checkers alone
    typed = source.partition("class OptionValues")[2].partition("\n\n\n")[0]
    assert re.findall(r"^        (\w+): ", typed, re.MULTILINE) == fields


@pytest.mark.parametrize("option", TABLE, ids=lambda option: option.name)
def test_defaults_in_words_are_the_defaults(option):
    if option.name in ("include", "exclude", "image_dir"):
        assert not getattr(Options(), option.name)
    else:
        assert option.parse(option.name, option.default) == getattr(Options(), option.name)


def test_docstring_says_what_the_table_says():
    text = inspect.getdoc(page_primer.prime).partition("Args:\n")[2].partition("\n\n")[0]
    said = [words(entry) for entry in re.split(r"\n    (?=\w)", text.rstrip())]
    assert said[1:] == [f"{option.name}: {option.help}." for option in TABLE]
    assert said[0].startswith("options: ")


def test_page_says_what_the_table_says():
    page = (ROOT / "docs" / "options.md").read_text()
    table = page.partition("| argument | variable | default | meaning |\n")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [
        f"| `{o.name}` | `{o.variable}` | {o.default} | {o.help} |" for o in TABLE
    ]


def test_help_says_what_the_table_says():
    done = subprocess.run(
        [sys.executable, "-m", "page_primer", "run", "--help"], capture_output=True, text=True
    )
    said = words(done.stdout)
    for option in TABLE:
        assert f"{option.flag} {option.value} {option.help} (default: {option.default}; " in said


# ----------------------------------------------------------------------------- unknown variables


def test_every_variable_that_the_sources_name_is_known():
    named = set()
    for path in (ROOT / "page_primer").rglob("*"):
        if path.suffix in (".py", ".c"):
            named |= set(re.findall(r"\bPAGE_PRIMER_[A-Z_]*[A-Z]\b", path.read_text()))
    assert named >= {*OTHER_VARIABLES, "PAGE_PRIMER_MERGE"}
    assert unknown_variables(dict.fromkeys(named, "1")) == ()


def test_unknown_variables():
    environ = {
        "PAGE_PRIMER": "1", "PAGE_PRIMER_LIMIT": "1M", "PAGE_PRIMER_LATE": "0",
        "PAGE_PRIMER_Z": "", "PAGE_PRIMER_LIMT": "1M", "PAGE_PRIMERS": "1", "page_primer_x": "1",
        # A service called page-primer, in each pod of its Kubernetes namespace.
        "PAGE_PRIMER_SERVICE_HOST": "10.0.0.1", "PAGE_PRIMER_PORT": "tcp://10.0.0.1:80",
        "PAGE_PRIMER_PORT_80_TCP_ADDR": "10.0.0.1",
    }  # fmt: skip
    assert unknown_variables(environ) == ("PAGE_PRIMER_LIMT", "PAGE_PRIMER_Z")
    Options.load({}, environ)  # is no error


PROGRAM = """
import logging, sys, page_primer
logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
report = page_primer.prime(remap=False, mlock=False)
report.log(logging.getLogger())
assert "difflib" in sys.modules or not report.unknown_variables
again = page_primer.prime(remap=False, mlock=False, merge=False)
again.log(logging.getLogger(), since=report)
print(str(report).count("unknown environment variable"))
"""


@pytest.mark.parametrize("switch", ["1", "0"])
def test_unknown_variables_are_one_warning(switch):
    environ = {
        "PAGE_PRIMER": switch, "PAGE_PRIMER_LIMT": "1M", "PAGE_PRIMER_WHATEVER": "1",
        "PAGE_PRIMER_IMAGES_DIR": "x",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "WARNING page-primer: unknown environment variables "
        "PAGE_PRIMER_IMAGES_DIR (did you mean PAGE_PRIMER_IMAGE_DIR?), "
        "PAGE_PRIMER_LIMT (did you mean PAGE_PRIMER_LIMIT?), PAGE_PRIMER_WHATEVER",
        "1",
    ], done.stderr


def test_without_unknown_variables_nothing_is_said_or_imported():
    """Nor that no code is on huge pages, by those who switched that off."""
    program = PROGRAM + "print('difflib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env={}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0", "False"], done.stderr


def test_a_mistake_on_the_command_line_is_called_as_it_was_given():
    for flag, value in (("--limit", "banana"), ("--image-dir", "images"), ("--merge", "perhaps")):
        done = subprocess.run(
            [sys.executable, "-m", "page_primer", "run", flag, value, "--", "true"],
            capture_output=True, text=True, env={"PAGE_PRIMER_BACKING": "memfd"},
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr.startswith(f"page-primer: {flag} must be ")
        assert done.stderr.count("\n") == 1
