"""Completion of `page-primer` by argcomplete, in a real bash with a terminal: what TAB adds."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.interpreters import MEASURED

pytest.importorskip("argcomplete", reason="needs argcomplete (the extra `cli`)")
BIN = Path(sys.executable).parent
READY = "ready to type"


class Shell:
    """An interactive bash with our completion, in a directory of its own."""

    def __init__(self, directory):
        bash = shutil.which("bash")
        if bash is None or not (BIN / "page-primer").exists():
            pytest.skip("needs bash, and page-primer installed")
        self.master, slave = pty.openpty()
        environ = {
            "PATH": f"{BIN}:{os.environ['PATH']}", "TERM": "dumb", "HOME": str(directory),
            "COLUMNS": "500", "INPUTRC": "/dev/null", **MEASURED,
        }  # fmt: skip
        self.bash = subprocess.Popen(
            [bash, "--norc", "--noprofile", "-i"], stdin=slave, stdout=slave, stderr=slave,
            env=environ, cwd=directory, start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.seen = ""
        settings = (
            "bell-style none", "enable-bracketed-paste off", "page-completions off",
            # One TAB shows all where there are several, as of process ids there may be.
            "show-all-if-ambiguous on", "completion-query-items 0",
        )  # fmt: skip
        self.type("; ".join(f"bind 'set {setting}'" for setting in settings) + "; PS1='> '\n")
        self.type('eval "$(register-python-argcomplete page-primer)"; echo ready to "type"\n')
        self.wait_for(READY)

    def type(self, text):
        os.write(self.master, text.encode())

    def wait_for(self, text, seconds=100):  # a busy machine takes its time
        end = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, saw {self.seen!r}"
            self.seen += os.read(self.master, 1 << 16).decode(errors="replace")

    def complete(self, line, expected):
        """Type a line and TAB, until the terminal shows the expected line; then clear it."""
        self.seen = ""
        self.type(line + "\t")
        self.wait_for(expected)
        self.type("\x15")  # Ctrl-U

    def close(self):
        os.close(self.master)
        self.bash.kill()
        self.bash.wait()


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shell")
    (directory / "server.py").write_text("")
    found = Shell(directory)
    yield found
    found.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("page-primer sta", "page-primer status "),
        ("page-primer doctor --js", "page-primer doctor --json "),
        ("page-primer run --backing mem", "page-primer run --backing memfd "),
        ("page-primer run --merge of", "page-primer run --merge off "),
        ("page-primer run python3 serv", "page-primer run python3 server.py"),
        ("page-primer bench --celery-t", "page-primer bench --celery-task "),
        ("page-primer build --imp", "page-primer build --import "),
        ("page-primer warm --hol", "page-primer warm --hold "),
        ("page-primer images pru", "page-primer images prune "),
    ],
)
def test_words(shell, line, expected):
    shell.complete(line, expected)


def test_processes_are_those_with_an_interpreter(shell):
    pid = str(os.getpid())
    shell.complete(f"page-primer status {pid[:-1]}", pid)


def test_without_argcomplete_nothing_is_said(tmp_path):
    (tmp_path / "argcomplete.py").write_text("raise ImportError('not installed')")
    environ = {
        **os.environ, "PYTHONPATH": str(tmp_path), "_ARGCOMPLETE": "1",
        "COMP_LINE": "page-primer ", "COMP_POINT": "12",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "page_primer"], env=environ, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
