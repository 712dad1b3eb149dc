"""Small parts of the commands, the launcher and the integrations by themselves."""

from __future__ import annotations

import argparse
import io
import logging
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from harness.servers import wait_for

import page_primer
from page_primer import _lean, health, integrations, processes, reasons
from page_primer.backing import image as image_backing
from page_primer.cli import completion, images, main, status, tables, terminal, user
from page_primer.doctor import alignment, coverage, examination
from page_primer.doctor.coverage import Coverage, Interpreter
from page_primer.doctor.examination import Examination
from page_primer.doctor.findings import INFO, OK
from page_primer.doctor.render import _draw
from page_primer.elf.file import PF_R, PF_X, PT_LOAD
from page_primer.images.places import Place
from page_primer.kernel.smaps import Mapping
from page_primer.launcher import warm
from page_primer.options import Options
from page_primer.processes import ProcessStatus

MIB = 1 << 20
SITE = str(Path(page_primer.__file__).parent / "launcher" / "site")


def program(text, *arguments, **environ):
    """Run a program; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *arguments], capture_output=True, text=True,
        timeout=100, env={**os.environ, **environ},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- page-primer ----------------------------------------------------------------------------------


def test_an_error_of_the_output_that_is_no_full_disk_is_not_hidden():
    with open(os.devnull) as only_read:
        done = subprocess.run(
            [sys.executable, "-m", "page_primer", "status", "--json", "--watch", str(os.getpid())],
            stdout=only_read, stderr=subprocess.PIPE, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 1
    assert "OSError: [Errno 9] Bad file descriptor" in done.stderr


def test_words_that_are_completed(tmp_path, monkeypatch):
    (tmp_path / "gunicorn").touch()
    (tmp_path / "python3").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/nonexistent")
    assert completion._commands("g", argparse.Namespace(argv=[])) == {"gunicorn"}
    assert "root" in completion._users()


def test_a_row_of_an_image():
    found: images.Image = {
        "path": "/store/x.so", "object": "/lib/x.so", "anchor": False, "size": 2 * MIB,
        "users": [], "locked": True, "last_use": 0.0, "current": False,
    }  # fmt: skip
    name, size, users, _, path = images._row(found)
    assert (name, size) == ("/lib/x.so (changed since)", "2.0 MiB")
    assert (users, path) == ("elsewhere", "/store/x.so")


@pytest.mark.parametrize("action", ["prune", "clear"])
@pytest.mark.images
def test_a_store_that_holds_nothing(tmp_path, capsys, action):
    (tmp_path / "images").mkdir(mode=0o755)
    assert main.main(["images", action, "--dir", str(tmp_path / "images")]) == 0
    out, error = capsys.readouterr()
    assert f"{tmp_path}/images: " in out and error == ""


@pytest.mark.parametrize(
    ("more", "why"),
    [("os.environ['PAGE_PRIMER_EXCLUDE'] = '*'", reasons.EXCLUDED),
     ("signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
      " resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))", "File too large")],
)  # fmt: skip
@pytest.mark.images
def test_what_is_not_built_is_named(tmp_path, more, why):
    text = f"""
        import os, resource, signal
        from page_primer.cli import main
        MIB = 1 << 20
        {more}
        print(main.main(["build", "--dir", {str(tmp_path / "images")!r}]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=100
    )
    assert f": left alone, {why}" in done.stdout, done
    assert done.stderr == "page-primer: build: no object here has room for a huge page\n"


def test_a_process_to_watch_that_is_not_there():
    words = [sys.executable, "-m", "page_primer", "status", str(1 << 30), "--watch"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"page-primer: no process {1 << 30}\n"


def test_many_processes_are_counted():
    found = [ProcessStatus(2000 + n, 1, f"/bin/python {n}", problem="gone") for n in range(42)]
    given = argparse.Namespace(each=False, all=False, pid=1000, python_only=True)
    lines = status._screen(given, found)
    assert lines[-1] == "  and 2 processes more (--json)"
    rows = [line.split() for line in lines if "(gone)" in line]
    assert rows == [[str(2000 + n), "(gone)", "python", str(n)] for n in range(40)]


def test_many_processes_below_are_counted(monkeypatch):
    monkeypatch.setattr(status, "_MOST", 0)
    command = ["sh", "-c", '"$0" -c "input()"; :', sys.executable]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as shell:
        wait_for(lambda: list(processes.topmost_python(shell.pid)), "Python below a shell")
        assert list(status._below(shell.pid)) == [
            "not Python itself; below it 1 Python process, with more below them:",
            "  and 1 more",
        ]
        shell.stdin.close()


def test_a_table_that_cannot_be_narrower_is_as_wide_as_it_is():
    table = tables.Table((tables.Column("title", left=True),), (("x" * 50,),))
    whole = f"  title\n  {'x' * 50}"
    assert tables.fit(table, 20) == tables.fit(table, 20, cut=False) == whole
    assert tables.fit(table, 100) == tables.fit(table, None) == whole


def test_characters_of_an_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert terminal.can_write("x") and not terminal.can_write(terminal.ELLIPSIS)
    assert terminal.length("e\u0301") == 1  # a letter and its accent


@pytest.mark.root("become another user")
def test_as_a_user_by_name_or_number(monkeypatch, capfd):
    home = tempfile.mkdtemp(prefix="page-primer-")
    try:
        os.chmod(home, 0o755)
        script = Path(home, "python")
        script.write_text('#!/bin/sh\necho $(id -u) $(id -g) $USER $HOME $PWD "$@"\nexit 7\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        assert user.run_as("root", ["doctor"]) == 7
        assert user.run_as("65533", ["doctor"]) == 7
        words = "/ -s -m page_primer doctor"
        assert capfd.readouterr().out == f"0 0 root {Path('~root').expanduser()} {words}\n" + (
            f"65533 65533 65533 / {words}\n"
        )
    finally:
        shutil.rmtree(home)
    assert user.run_as("65533", ["doctor"]) == 1
    assert capfd.readouterr().err == (
        f"page-primer: as user 65533: {script}: No such file or directory\n"
    )


# --- doctor ---------------------------------------------------------------------------------------

NONE = Coverage(0, 0.0, {})
INTERPRETER = Interpreter(
    path="/usr/bin/python3", kind="static", filesystem="ext4", segments=(), span=(0, 8 * MIB),
    pmd_size=2 * MIB, phase=0, huge_pages=4, code_bytes=4 * MIB, copied_bytes=0, image=NONE,
    memory=NONE, in_place=Coverage(3 * MIB, 0.75, {}), aligned=True, already=True, problem=None,
)  # fmt: skip


def test_an_interpreter_that_is_on_huge_pages_already():
    check = coverage.judge_interpreter(INTERPRETER, Options())
    assert check.status == OK
    assert check.found.endswith("; 75.0 % of it is on huge pages of its own file already")
    check = coverage.judge_backing([], INTERPRETER, Options(), (6, 12))
    assert (check.status, check.found) == (
        OK, "already: 75.0 % of the interpreter's code is on huge pages, nothing is copied"
    )  # fmt: skip


def test_a_layout_without_huge_pages():
    layout = Interpreter(**{**vars(INTERPRETER), "pmd_size": 0})
    assert list(_draw(layout)) == ["/usr/bin/python3", "  static, on ext4"]


def test_a_c_library_that_is_not_glibc(monkeypatch):
    monkeypatch.setattr("os.confstr", lambda _: None)
    assert alignment._libc([]) == ("", (0, 0))
    found = alignment.Alignment("/lib/libpython3.so", "aligned", libc="musl")
    hints = alignment._hints(found, (6, 1))
    assert hints == "; musl's loader does not align libraries: their addresses are random"


def test_a_heap_that_can_be_huge():
    check = examination.judge_heap(Options(heap="auto"), 2 * MIB)
    if check.code == "heap-left-alone":
        pytest.skip(f"it cannot be here: {check.found}")
    assert check.status == OK and check.found.startswith("auto: ")


def test_directories_that_are_passed_over(monkeypatch, tmp_path):
    monkeypatch.setattr(image_backing, "release", lambda: (5, 10))
    found = list(Examination(Options()).directories())
    assert found and {(check.status, check.found) for check in found} == {
        (INFO, "passed over: files are on huge pages from Linux 6.1 on")
    }
    place = Place(str(tmp_path), system=True)
    monkeypatch.setattr(image_backing, "directories", lambda _: [place])
    (check,) = Examination(Options()).directories()
    assert (check.status, check.name) == (INFO, f"image directory {tmp_path}")
    assert check.code == "no-image-in-roots-store"


def test_memory_that_nothing_is_moved_to_is_not_tried():
    for options in (Options(remap=False), Options(backing="image")):
        assert list(Examination(options).memory()) == []


# --- processes ------------------------------------------------------------------------------------


def test_figures_that_the_kernel_does_not_tell():
    assert health._size([b"VmLck:\t      12 kB"], b"VmLck:") == 12 << 10
    assert health._size([], b"VmLck:") is None
    assert health._kernel_lines()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        assert health._kernel_lines() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_files_that_are_mapped_in_strange_ways(tmp_path):
    def mapped(path, offset=0):
        return Mapping(MIB, 2 * MIB, "r-xp", offset, "08:01", 5, str(path))

    (tmp_path / "text").write_text("not an ELF file\n" * 10)
    for path in (tmp_path / "text", tmp_path / "missing"):
        assert processes._program_headers(os.getpid(), mapped(path)) is None
    program = os.path.realpath(sys.executable)
    assert processes._program_headers(os.getpid(), mapped(program))
    assert processes._loaded(os.getpid(), [mapped(program, 1 << 40)]) == []  # of no segment


@pytest.mark.parametrize("size", [0, 1 << 12])
def test_a_segment_that_is_smaller_in_memory_than_in_its_file(tmp_path, size):
    """No linker writes that, but a process may have mapped it."""
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1,
                         64, 0, 0)  # fmt: skip
    load = struct.pack("<IIQQQQQQ", PT_LOAD, PF_R | PF_X, 0, 0, 0, 1 << 16, size, 1 << 12)
    (tmp_path / "x.so").write_bytes(header + load)
    mapping = Mapping(MIB, 2 * MIB, "r-xp", 1 << 15, "08:01", 5, str(tmp_path / "x.so"))
    assert processes._program_headers(os.getpid(), mapping) == load
    found = processes._loaded(os.getpid(), [mapping])
    assert [one.base for one in found] == [MIB - (1 << 15)] * bool(size)


def test_a_signal_handler_is_known():
    """By the frame that it was given, or by what the signal module knows of."""

    class Object:
        def __call__(self, number, frame):
            del number, frame
            return sys._getframe()

    def given(number, frame):
        return sys._getframe()

    def forgets(number, frame):
        del number, frame
        return sys._getframe()

    here, called = sys._getframe(), Object()
    assert _lean._interrupted(here, given(0, here))
    before = signal.getsignal(signal.SIGUSR2)
    for handler in (forgets, called):
        assert not _lean._interrupted(here, handler(0, here))
        try:
            signal.signal(signal.SIGUSR2, handler)
            assert _lean._interrupted(here, handler(0, here))
        finally:
            signal.signal(signal.SIGUSR2, before)


def test_a_call_within_a_call_does_nothing():
    """As by a signal handler of the host's."""
    text = """
        import page_primer
        from page_primer import _core
        print(_core.alone(lambda: page_primer.restore().reason, lambda is_mine: None))
        """
    assert program(text) == f"{reasons.IN_SIGNAL_HANDLER}\n"


# --- integrations ---------------------------------------------------------------------------------


def test_a_bad_option_suggests_nothing(monkeypatch, caplog):
    logger = logging.getLogger("mine")
    with caplog.at_level(logging.INFO, "mine"):
        integrations.suggest_freeze(logger, "preloaded")
        assert len(caplog.records) == 1
        monkeypatch.setenv("PAGE_PRIMER_LIMIT", "nonsense")
        integrations.suggest_freeze(logger, "preloaded")
        assert len(caplog.records) == 1


def test_middleware_with_a_logger_of_its_own(monkeypatch, caplog):
    monkeypatch.setenv("PAGE_PRIMER", "0")
    monkeypatch.setattr(integrations, "_last", None)
    wrapper = integrations.Wrapper(None, logging.getLogger("mine"))
    with caplog.at_level(logging.INFO, "mine"):
        wrapper._prime()
    assert [record.name for record in caplog.records] == ["mine"]
    assert integrations._last.reason == reasons.SWITCHED_OFF


def test_a_gunicorn_that_is_too_old(monkeypatch):
    gunicorn = pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    from page_primer.integrations import gunicorn as ours

    monkeypatch.setattr(gunicorn, "__version__", "19.9.0")
    with pytest.raises(SystemExit, match=r"^page-primer: .*19\.9\.0"):
        ours.on_starting(None)


def test_our_own_hook_is_not_called_twice():
    pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    from page_primer.integrations import gunicorn_conf

    ours = gunicorn_conf.post_fork
    assert gunicorn_conf._chain("post_fork", ours, ours) is ours


def test_a_gunicorn_configuration_that_is_no_python_file(tmp_path):
    pytest.importorskip("gunicorn", reason="gunicorn is not installed")
    ours = Path(page_primer.__file__).parent / "integrations" / "gunicorn_conf.py"
    (tmp_path / "conf.txt").touch()
    done = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--check-config", "-c", str(ours),
         "wsgiref.simple_server:demo_app"],
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env={**os.environ, "PAGE_PRIMER_GUNICORN_CONF": "conf.txt"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "names 'conf.txt', which is not a Python file" in done.stderr


def test_prometheus_forgets_no_reason(tmp_path):
    """What a process was told of once is 0 when it is no longer so."""
    pytest.importorskip("prometheus_client", reason="it is not installed")
    values = program(
        """
        import page_primer, prometheus_client
        from page_primer import reasons
        from page_primer.integrations import prometheus
        registry = prometheus_client.CollectorRegistry()
        prometheus.export(registry)
        for change in (lambda: page_primer.prime(remap=False, mlock=False), page_primer.restore):
            change()
            prometheus.update()
            left = {"reason": str(reasons.REMAP_OFF)}
            print(registry.get_sample_value("page_primer_code_left_bytes", left))
        """,
        PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
    ).split()
    assert float(values[0]) > MIB and values[1:] == ["0.0"]


# --- the launcher ---------------------------------------------------------------------------------


def test_a_process_starts_once_and_not_where_it_is_switched_off():
    """Two installations' sitecustomize may be on PYTHONPATH."""
    assert (
        program("""
        import os, page_primer
        from page_primer.launcher import child
        for switch in "01":
            os.environ["PAGE_PRIMER"] = switch
            child.start()
            print(page_primer._process)
        """)
        == "None\nNone\n"
    )


def test_a_line_for_a_closed_pipe_or_nobody():
    assert (
        program("""
        import os, signal, sys
        from page_primer.launcher import child
        real = os.dup(2)
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        child.say("one")
        print(os.read(reader, 100))
        os.close(reader)
        os.dup2(writer, 2)
        os.close(writer)
        child.say("two")
        print(signal.sigpending(), signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        os.dup2(real, 2)
        sys.__stderr__ = None
        child.say("three")
        """)
        == "b'one\\n'\nset() set()\n"
    )


def test_a_program_that_is_being_written_cannot_be_started(tmp_path):
    path = tmp_path / "program"
    shutil.copy(shutil.which("true"), path)
    with path.open("r+b"):
        words = [sys.executable, "-m", "page_primer", "run", "--", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.stderr == f"page-primer: {path}: Text file busy\n"
    assert done.returncode == 126


LOADED = """
import importlib.machinery, importlib.util, os, sys, warnings
{before}
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[2])
path = os.path.join(sys.argv[1], "sitecustomize.py")
loader = importlib.machinery.SourceFileLoader("sitecustomize", path)
module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
sys.modules["sitecustomize"] = module
try:
    {load}
except RuntimeError as error:
    print(error, sys.modules.get("sitecustomize") is module, "page_primer" in sys.modules)
"""


LOADS = {
    "exec_module": "loader.exec_module(module)",
    "load_module": "loader.load_module()",
    "load_module of a new module": "module = None; del sys.modules[loader.name];"
    " loader.load_module()",
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("before", ["", "import page_primer"])
def test_a_sitecustomize_that_somebody_loads(tmp_path, load, before):
    """The next one's error is theirs to see, and what they loaded stays in place."""
    if sys.version_info >= (3, 15) and "load_module" in load:
        pytest.skip("CPython 3.15 has no load_module()")
    (tmp_path / "sitecustomize.py").write_text("raise RuntimeError('next')\n")
    text = LOADED.format(load=LOADS[load], before=before)
    assert program(text, SITE, str(tmp_path), PAGE_PRIMER="0") == "next True True\n"


@pytest.mark.parametrize("closed", [False, True])
def test_a_bad_option_of_a_process_that_starts(closed):
    command = ["sh", "-c", f'exec "$@" {"2>&-" if closed else ""}', "sh"]
    done = subprocess.run(
        [*command, sys.executable, "-c", "print('program')"],
        capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": SITE, "PAGE_PRIMER_VERBOSE": "1",
             "PAGE_PRIMER_LIMIT": "nonsense"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "program\n")
    if closed:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith("page-primer: ValueError: PAGE_PRIMER_LIMIT")


def test_what_warm_names_for_a_user():
    """Root's list, without what execv(2) would not take; nothing where the program reads it."""
    text = """
        import os
        from page_primer.launcher import warm
        listed = ["/a", "b\\0", "/" + "x" * 5000, *["/c"] * 2000]
        if os.geteuid() == 0:
            print(len(warm._of_user(listed)))
            os.seteuid(65533)
        else:
            print(0)
        found = warm._of_user(listed)
        print(found[:2], len(found))
        """
    assert program(text) == "0\n['/a', '/c'] 1000\n"


def test_warm_without_its_program():
    text = """
        import page_primer.align.memory
        from page_primer.launcher import warm
        page_primer.align.memory.program = lambda: None
        os_errors = warm.main(["/lib/x.so"]), warm.main(["--", "/nonexistent/x"])
        print(os_errors, warm.main(["--", "/dev/null"]))
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=100
    )
    missing = "page-primer: page-primer-warm is not installed\n"
    assert (done.stdout, done.stderr) == (
        "(1, 127) 126\n",
        f"{missing * 2}page-primer: /nonexistent/x: No such file or directory\n"
        f"{missing}page-primer: /dev/null: Permission denied\n",
    )


def test_what_cannot_be_rewritten(tmp_path, capsys):
    if page_primer.align.memory.program() is None:
        pytest.skip("page-primer-warm is not installed")
    (tmp_path / "text").write_text("text")
    warm._rewrite([str(tmp_path / "text"), "a\0b"], quiet=False, command=False)
    assert capsys.readouterr().out == "a\0b: not rewritten: embedded null byte\n"
    for path in (tmp_path / "text", tmp_path / "missing"):
        assert not warm._is_aligned(str(path), 2 * MIB)
