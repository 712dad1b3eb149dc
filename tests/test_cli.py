"""The command line itself: its version, its tables."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from harness.terminal import on_terminal

import page_primer
from page_primer.cli import bars, tables, terminal
from page_primer.words import counted

COMMAND = [sys.executable, "-m", "page_primer"]
ROWS = (("/a/file", "12.0 MiB", "on ext4"), ("/b", "1.0 MiB", ""))


def output(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=100, **options
    )


def test_version():
    version = metadata.version("page-primer")
    assert page_primer.__version__ == version
    assert output("--version").stdout == f"page-primer {version}\n"
    assert "--version" in output("--help").stdout


def test_version_of_the_package_that_is_imported(tmp_path):
    """Under `page-primer run` it need not be one that sys.path leads to, or any."""
    (tmp_path / "page_primer").symlink_to(Path(page_primer.__file__).parent)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport page_primer\n"
    isolated = [sys.executable, "-I", "-S", "-c"]
    program += "print(page_primer.__version__)"
    done = subprocess.run([*isolated, program], capture_output=True, text=True)
    assert done.stdout == "unknown\n", done.stderr
    information = tmp_path / "page_primer-9.8.7.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: page-primer\nVersion: 9.8.7\n")
    done = subprocess.run([*isolated, program], capture_output=True, text=True)
    assert done.stdout == "9.8.7\n", done.stderr


def test_importing_the_package_does_not_look_for_the_version():
    program = "import sys, page_primer; print('importlib.metadata' in sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c",
                           f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout == "False\n", done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'prim'"):
        page_primer.prim  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--bogus", "true"], "page-primer run: error: unrecognized arguments: --bogus"),
        (["run", "--lim", "5M", "true"], "page-primer run: error: unrecognized arguments: --lim"),
        (["status", "--bogus", "1"], "page-primer status: error: unrecognized arguments: --bogus"),
        (["doctor", "now"], "page-primer doctor: error: unrecognized arguments: now"),
        (["build", "--bogus"], "page-primer build: error: unrecognized arguments: --bogus"),
        (["bench", "--bogus"], "page-primer bench: error: unrecognized arguments: --bogus"),
        (["images", "sort"], "page-primer images: error: argument action: invalid choice: 'sort'"),
        (["run", "--limit", "banana", "true"], "page-primer: --limit must be a number of bytes"),
        (["run", "--heap", "some", "true"], "page-primer: --heap must be"),
        (["run"], "page-primer: run: no command"),
        ([], "usage: page-primer "),
    ],
)
def test_mistakes_are_answered_where_they_were_made(words, message):
    done = output(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    usage = done.stderr.partition("\n")[0]
    if "error: " in message:
        assert usage.startswith(f"usage: page-primer {words[0]} ")
    assert "PAGE_PRIMER_LIMIT" not in done.stderr, "the option as it was written"


def test_a_variable_is_named_as_it_was_written():
    done = output("run", "true", env={**os.environ, "PAGE_PRIMER_LIMIT": "banana"})
    assert done.returncode == 2
    assert done.stderr.startswith("page-primer: PAGE_PRIMER_LIMIT must be a number of bytes")


def test_numbers_agree_with_their_nouns():
    """The kind: a number before a plural noun is written by counted()."""
    assert [counted(n, "object") for n in (0, 1, 2)] == ["0 objects", "1 object", "2 objects"]
    assert counted(2, "process", "es") == "2 processes"
    plural = re.compile(r"\{[^{}]*\} (objects|problems|warnings|images|pages|processes|files)\b")
    sources = Path(page_primer.__file__).parent.rglob("*.py")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if plural.search(line) and 'f"' in line
    ]
    # "2 of 9 pages", and a whole number of huge pages that is one at least twice over.
    allowed = ("of {", "whole huge pages", "{settings.pool}")
    assert not [line for line in found if not any(word in line for word in allowed)]


def table(*titles, rows, notes=(), **more):
    columns = tuple(
        tables.Column(title, left=n in (0, len(titles) - 1), **more.get(title, {}))
        for n, title in enumerate(titles)
    )
    return tables.Table(columns, tuple(map(tuple, rows)), notes)


def test_table():
    text = tables.fit(table("file", "size", "where", rows=ROWS), None)
    assert text.splitlines() == [
        "  file         size  where",
        "  /a/file  12.0 MiB  on ext4",
        "  /b        1.0 MiB",
    ]


def test_table_with_notes():
    found = table(
        "state", "found", rows=(("ok", "many words " * 5), ("problem", "none")),
        notes=(None, "fix: " + "x" * 100), found={"wraps": True},
    )  # fmt: skip
    lines = tables.fit(found, 42).splitlines()
    assert lines[1:3] == [
        "  ok       many words many words many",
        " " * 11 + "words many words many words",
    ]
    assert lines[3:] == ["  problem  none", " " * 11 + "fix: " + "x" * 100]


def test_a_narrow_table_drops_columns_then_cuts_names_and_breaks_none(monkeypatch):
    monkeypatch.setattr(terminal, "can_write", lambda _: True)
    rows = (("/usr/lib/libpython3.11.so.1.0", "2.2 MiB", "4.1 MiB", "image in /var/cache"),)
    found = table("object", "code", "copied", "on", rows=rows, copied={"goes": 1},
                  object={"cuts": "start"}, on={"cuts": "end"})  # fmt: skip
    for width in range(40, 90):
        lines = tables.fit(found, width).splitlines()
        assert len(lines) == 2, "no cell is folded"
        assert max(map(terminal.length, lines)) <= width
        assert ("copied" in lines[0]) == (width >= 70), "a column goes before a name is cut"
        cells = lines[1].split("  ")[1:]
        assert rows[0][0].endswith(cells[0].removeprefix("…"))
    assert "…" in tables.fit(found, 50)


def test_where_names_would_be_too_short_more_columns_go(monkeypatch):
    monkeypatch.setattr(terminal, "can_write", lambda _: True)
    rows = (("libpython3.11.so.1.0", "100 %", "5.7 MiB", "image in /var/cache"),)
    found = table("object", "huge", "locked", "on", rows=rows, object={"cuts": "end"},
                  locked={"goes": -2}, on={"cuts": "path", "goes": -1})  # fmt: skip
    titles = [tables.fit(found, width).split("\n")[0].split() for width in (60, 50, 36, 28, 20)]
    assert titles == [
        ["object", "huge", "locked", "on"],
        ["object", "huge", "locked", "on"],
        ["object", "huge", "locked"],
        ["object", "huge"],
        ["object", "huge"],
    ]
    (name, *_) = tables.fit(found, 36).splitlines()[1].split()
    assert name == "libpython3.11.so.…"


def test_paths_lose_folders_before_a_column_is_left_out(monkeypatch):
    monkeypatch.setattr(terminal, "can_write", lambda _: True)
    rows = (("/opt/venv/lib/python3.11/site-packages/pyarrow/libarrow.so.2600", "26.8 MiB", "17"),)
    found = table("file", "code", "chunks", rows=rows, file={"cuts": "path"}, chunks={"goes": 1})
    wide, narrow, narrowest = (tables.fit(found, width).splitlines()[1] for width in (56, 40, 30))
    assert wide.split() == ["…/pyarrow/libarrow.so.2600", "26.8", "MiB", "17"]
    assert narrow.split() == ["…/pyarrow/libarrow.so.2600", "26.8", "MiB"]
    assert narrowest.split() == ["…/libarrow.so.2600", "26.8", "MiB"]
    assert "chunks" in tables.fit(found, 56)
    assert "chunks" not in tables.fit(found, 40)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, "/usr/lib/python3/numpy/_umath.cpython-311-x86_64.so"),
        (50, "…/lib/python3/numpy/_umath.cpython-311-x86_64.so"),
        (36, "…/numpy/_umath.cpython-311-x86_64.so"),
        (35, "…/_umath.cpython-311-x86_64.so"),
        (29, "…_umath.cpython-311-x86_64.so"),
        (28, "_umath.cpython-311-x86_64.so"),
        (27, "_umath.cpython-311-x86_64.…"),
        (12, "_umath.cpyt…"),
    ],
)
def test_a_path_loses_folders_and_then_the_end_of_its_name(monkeypatch, width, shown):
    monkeypatch.setattr(terminal, "can_write", lambda _: True)
    path = "/usr/lib/python3/numpy/_umath.cpython-311-x86_64.so"
    assert terminal.cut_path(path, width) == shown
    assert terminal.cut_path("processor ms a request/s", 12) == "processor m…"
    placed = "image in /var/cache/page-primer"
    assert terminal.cut_path(placed, 29) == "image in …/cache/page-primer"
    assert terminal.cut_path(placed, 17) == "image in page-pr…"
    assert terminal.cut_path(placed, 12) == "…page-primer"


def test_wide_characters_and_control_characters():
    assert terminal.length("\x1b[31m" + "日本" + "\x1b[0m") == 4
    assert terminal.one_line("a\x1b[2Jb\nc") == "a [2Jb c"
    assert terminal.length(terminal.cut("日本語" * 9, 7)) <= 7


def test_bars_are_of_one_length_and_show_what_there_is():
    for sizes in ((1, 0, 0, 10**9), (0, 0, 0, 0), (5, 5, 5, 5), (10**9, 1, 1, 1), (0, 7, 0, 3)):
        given = dict(zip(bars.NAMES, sizes, strict=True))
        text = bars.bar(given, 16)
        assert len(text) == 16, sizes
        signs = {kind[1] for kind, size in zip(bars.KINDS, sizes, strict=True) if size}
        if signs and terminal.can_write("█"):
            assert set(text) == signs, sizes


@pytest.mark.slow
def test_doctor_on_a_terminal_and_in_a_pipe():
    plain = output("doctor", env={**os.environ, "COLUMNS": "80"}).stdout
    fancy = on_terminal(*COMMAND, "doctor", columns=80, statuses=(0, 1, 2))
    assert "\x1b[1m" in fancy, "a bold heading"
    assert "\x1b[32mok" in fancy
    assert "\x1b" not in plain
    assert "\x1b" not in on_terminal(*COMMAND, "doctor", statuses=(0, 1, 2), NO_COLOR="1")
    for text in (plain, fancy):
        assert "Linux" in text
        assert text.splitlines()[-1].count(",") == 2
        notes = [line for line in text.splitlines() if line.lstrip().startswith(("fix: ", "try: "))]
        assert len({len(line) - len(line.lstrip()) for line in notes}) <= 1
    fixes = [
        [
            line.strip()
            for line in text.splitlines()
            # Of servers that come and go on this machine.
            if ("fix: " in line or "try: " in line) and "PAGE_PRIMER_FREEZE" not in line
        ]
        for text in (plain, fancy)
    ]
    assert fixes[0] == fixes[1], "a fix is in one line, whatever the width"


def test_status_on_a_terminal():
    text = on_terminal(*COMMAND, "status", str(os.getpid()), "--all", columns=200)
    assert "\x1b[1m" in text
    assert "libc.so.6" in text
