"""`page-primer status`, compared with smaps as the tests read them."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
from harness import outside
from harness.privileges import has_images, locks_fit
from harness.process import Process, interpreter
from harness.servers import wait_for
from harness.terminal import on_terminal, without_colours

MIB = 1 << 20


STATUS = [sys.executable, "-m", "page_primer", "status"]


def status(*arguments):
    environ = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [*STATUS, *map(str, arguments)],
        capture_output=True, text=True, encoding="utf-8", env=environ,
    )  # fmt: skip


def status_json(*arguments):
    return json.loads(status("--json", *arguments).stdout)


def by_path(process_status, path):
    return next(obj for obj in process_status["objects"] if obj["path"] == path)


@pytest.mark.parametrize("backing", ["image", "memfd", "anonymous", None])
def test_it_tells_what_smaps_tells(every_python, images, backing):
    with Process(every_python) as process:
        if backing:
            report = process.prime(backing=backing, image_dir=str(images), keep_profilers=False)
            path = interpreter(report)["path"]
        path = outside.interpreter_file(process.pid)
        text = outside.text_of(process.pid, path)
        ((found),) = json.loads(status("--json", process.pid).stdout)
        assert (found["pid"], found["problem"]) == (process.pid, None)
        core = by_path(found, path)
        # Code is all of the executable segments, .text the greatest part of them.
        assert 0 <= core["code_huge_bytes"] - text.huge <= 0x10000
        assert core["code_bytes"] >= text.size
        # Other processes come and go on what is mapped from the file; the command itself is one.
        on_file = [v.kb for v in text.span_vmas if v.path == path]
        moved = text.pss - (sum(kb["Pss"] for kb in on_file) << 10)
        assert moved <= core["pss_bytes"] <= moved + (sum(kb["Rss"] for kb in on_file) << 10)
        assert core["copied_bytes"] == sum(
            v.end - v.start for v in text.span_vmas if v.path != path
        )
        assert bool(core["copied_bytes"]) == bool(text.huge)
        if backing:
            assert found["locked_bytes"] > 0
            assert core["locked_bytes"] >= text.span or not locks_fit()
            measured = interpreter(report)
            for name in ("code_bytes", "code_huge_bytes", "copied_bytes", "locked_bytes"):
                assert core[name] == measured[name], name
        paths = [obj["path"] for obj in found["objects"]]
        assert len(paths) == len(set(paths)), "an object is listed once"
        assert any(path.endswith("libc.so.6") for path in paths)


def test_children_are_shown(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        child = process.run(
            "import os, signal\nchild = os.fork()\n"
            "if child == 0: signal.pause(); os._exit(0)\nresult = child"
        )
        try:
            found = json.loads(status("--json", process.pid).stdout)
            assert [one["pid"] for one in found] == [process.pid, child]
            assert found[1]["parent"] == process.pid
            assert found[1]["locked_bytes"] == 0, "a fork does not inherit locks"
            text = status(process.pid).stdout
            assert ("image in" if has_images() else "memfd") in text
            assert "100 %" in text or not has_images()
            (row,) = [line for line in text.splitlines() if line.split()[:1] == [str(child)]]
            assert "driver.py" in row, "its command"
            assert text.count("libc.so.6") == 1, "a table of objects for the first alone"
            assert status("--each", process.pid).stdout.count("libc.so.6") == 2
        finally:
            process.run(f"os.kill({child}, 9); os.waitpid({child}, 0)")


def test_not_a_python_process():
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        done = status(sleeper.pid)
        assert done.returncode == 0
        assert "libc.so.6" in done.stdout
    finally:
        sleeper.kill()
        sleeper.wait()


def test_no_such_process():
    ended = subprocess.Popen(["true"])
    ended.wait()
    done = status(ended.pid)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"page-primer: no process {ended.pid}\n"


def test_a_process_without_mappings():
    """A kernel thread, or a zombie."""
    zombie = subprocess.Popen(["true"])
    try:
        while open(f"/proc/{zombie.pid}/stat").read().split()[2] != "Z":
            pass
        done = status(zombie.pid)
        assert (done.returncode, done.stderr) == (1, "")
        assert "  nothing is mapped: it has ended" in done.stdout
    finally:
        zombie.wait()


def test_a_closed_pipe_is_quiet():
    script = f'"{sys.executable}" -m page_primer status --all $$ | true'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""


USAGE_ERRORS = "status nonsense", "bench --unknown", "build --unknown", "warm --unknown"


@pytest.mark.slow
def test_a_closed_pipe_and_a_full_stderr_change_no_exit_status():
    command = f'"{sys.executable}" -m page_primer'
    for words, code in (
        # More than a pipe holds, so that the writer finds it closed.
        ("status --all --json $$ | true", 0),
        ("doctor | true", 0),
        ("status 4194305 2> /dev/full", 1),
        *((f"{words} 2> /dev/full", 2) for words in USAGE_ERRORS),
        ("status --all $$ 2> /dev/full > /dev/null", 0),
        ("status 4194305 2>&-", 1),
    ):
        script = f"set -o pipefail; {command} {words}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, ""), words


@pytest.mark.parametrize("words", ["status --all $$", "status --json $$", "doctor", "images"])
def test_a_full_disk_is_one_line(words):
    script = f'"{sys.executable}" -m page_primer {words} > /dev/full'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "page-primer: standard output: No space left on device\n"


def test_command_line_errors():
    for words, message in (
        (["nonsense"], "argument PID: invalid process id: 'nonsense'"),
        (
            ["1", "--interval", "often"],
            "argument --interval: not a number of seconds above 0: 'often'",
        ),
    ):
        done = status(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: page-primer status ")
        assert message in done.stderr


@pytest.mark.slow
def test_of_what_is_not_python_only_the_nearest_python_is_named(python):
    """An init, a shell: what is below them may be all of the machine."""
    forks = "import os, signal; os.fork(); signal.pause()"
    shell = subprocess.Popen(
        ["sh", "-c", f'sleep 100 & "{python}" -c "{forks}" & wait'], start_new_session=True
    )
    try:
        wait_for(lambda: len(status_json("--python-only", shell.pid)) == 2, "two Pythons")
        text = status(shell.pid).stdout
        assert "below it 1 Python process, with more below them:" in text
        assert text.count("signal.pause()") == 2, "the shell's own command, and the one below it"
        assert "sleep 100\n" not in text
        assert [one["pid"] for one in status_json(shell.pid)] == [shell.pid]
        only = status("--python-only", shell.pid).stdout
        assert only.count("signal.pause()") == 2
        assert "libc.so.6" not in only
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


def test_the_root_of_everything_is_one_process():
    done = status(1)
    assert done.returncode in (0, 1)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1  ")
    everything = subprocess.run(["ps", "-eo", "pid="], capture_output=True, text=True)
    assert len(lines) < 60, f"{len(lines)} lines for {len(everything.stdout.split())} processes"
    assert [one["pid"] for one in status_json(1)][:1] == [1]


def test_object_counts_are_those_of_the_log(python, images):
    with Process(python) as process:
        report = process.prime(image_dir=str(images))
        (found,) = status_json(process.pid)
        assert {obj["path"] for obj in found["objects"]} == {
            obj["path"] for obj in report["objects"]
        }
        count = len(report["objects"])
        assert f"in {count} objects; " in process.run("result = str(report)")
        assert f"all {count} objects " in status(process.pid).stdout


def test_bars_are_what_smaps_has(python, images):
    """Of an image: huge and shared; of memory: huge and private."""
    with Process(python) as process, Process(python) as other:
        report = process.prime(image_dir=str(images))
        again = other.prime(image_dir=str(images))
        if interpreter(report)["backing"] != "image" or again["copied_bytes"] == 0:
            pytest.skip("no image has huge pages here")
        core = by_path(status_json(process.pid)[0], interpreter(report)["path"])
        # A report counts what is a segment's, of the last page as well.
        assert 0 <= core["huge_bytes"] - interpreter(report)["huge_bytes"] <= MIB
        shared = interpreter(again)["where"] == interpreter(report)["where"]
        if shared:
            assert core["huge_private_bytes"] < core["huge_bytes"] / 10
    with Process(python) as process:
        report = process.prime(backing="anonymous", keep_profilers=False)
        if interpreter(report)["backing"] != "anonymous":
            pytest.skip("anonymous memory has no huge pages here")
        core = by_path(status_json(process.pid)[0], interpreter(report)["path"])
        assert core["huge_private_bytes"] == core["huge_bytes"] > 0
        assert core["huge_bytes"] + core["small_locked_bytes"] <= core["lockable_bytes"] + (2 << 20)
        text = status(process.pid).stdout
        rows = [line for line in text.splitlines() if line.endswith("anonymous memory")]
        assert rows and all("▓" in row for row in rows), text


@pytest.mark.slow
def test_lines_fit_the_terminal(python, images):
    with Process(python) as process:
        process.prime(image_dir=str(images))
        for columns in (40, 60, 70, 80, 120):
            for words in ([], ["--all"], ["--each"]):
                text = on_terminal(*STATUS, *words, str(process.pid), columns=columns)
                text = without_colours(text)
                wide = [line for line in text.splitlines() if len(line) > columns]
                assert not wide, (columns, wide)
        first = on_terminal(*STATUS, str(process.pid), columns=60).splitlines()[0]
        assert "…" in first, "a command line is cut"
        assert "…" not in status(process.pid).stdout, "and not in a pipe"


def test_watch():
    """Again and again, until it has ended; as JSON a line each time."""
    sleeper = subprocess.Popen(["sleep", "100"])
    command = [sys.executable, "-m", "page_primer", "status", "--watch", "--interval", "0.1"]
    try:
        for more in ([], ["--json"]):
            watch = subprocess.Popen(
                [*command, *more, str(sleeper.pid)], stdout=subprocess.PIPE, text=True,
                # What runs the tests may ignore it, as a shell does for what is in the background.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
            assert watch.stdout is not None
            seen = 0
            while seen < 3:
                line = watch.stdout.readline()
                assert line, watch.wait()
                seen += json.loads(line)[0]["pid"] == sleeper.pid if more else "sleep 100" in line
            if more:
                sleeper.kill()
                sleeper.wait()
            else:
                watch.send_signal(signal.SIGINT)
            assert watch.wait(60) == 0
            watch.stdout.close()
    finally:
        sleeper.kill()
        sleeper.wait()


class Watch:
    """`status --watch` on a terminal of some size."""

    def __init__(self, pid, columns, rows, **environ):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        given = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*STATUS, "--watch", "--interval", "1000", str(pid)], stdout=slave,
            env={**given, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environ},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(slave)

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def read(self, last):
        """What comes up to some last bytes; empty: to the end."""
        text = b""
        while not (last and text.endswith(last)):
            try:
                text += os.read(self.master, 1)
            except OSError:  # EIO: nobody has the terminal open any more
                assert not last, text
                break
        return text.decode().replace("\r\n", "\n")

    def frame(self):
        """The lines of one screen."""
        text = self.read(b"\x1b[J\x1b[?7h")
        start, _, text = text.partition("\x1b[?7l\x1b[H")
        assert start in ("", "\x1b[2J"), start
        text = without_colours(text).removesuffix("\x1b[J\x1b[?7h")
        assert text.endswith("\n")
        lines = text[:-1].split("\n")
        assert all(line.startswith("\x1b[K") for line in lines), lines
        return [line.removeprefix("\x1b[K") for line in lines]

    def end(self):
        self.process.send_signal(signal.SIGINT)
        text = self.read(b"")
        os.close(self.master)
        assert self.process.wait(60) == 0
        return text


def test_watch_on_a_terminal(python):
    """Each screen is written over the one before and fits; another size is another screen at once;
    Ctrl-C leaves the cursor on a line of its own."""
    with Process(python) as process:
        watch = Watch(process.pid, 60, 8)
        lines = watch.frame()
        assert lines[0].startswith(f"{process.pid}  ")
        assert len(lines) == 7, lines
        assert re.fullmatch(r"  and \d+ more lines", lines[-1]), lines
        assert max(map(len, lines)) <= 60, lines
        watch.resize(100, 60)
        watch.process.send_signal(signal.SIGWINCH)  # not the terminal's foreground here
        lines = watch.frame()
        assert "small, locked" in lines[-1], lines
        assert 60 < max(map(len, lines)) <= 100, lines
        assert watch.end() == "\x1b[?7h\n"


def test_watch_on_a_terminal_that_cannot_move_its_cursor(python):
    with Process(python) as process:
        watch = Watch(process.pid, 80, 8, TERM="dumb")
        text = watch.read(b" small\r\n\r\n")
        assert text.startswith(f"{process.pid}  ")
        assert (text + watch.end()).count("\x1b") == 0


def test_what_is_not_locked_has_a_reason():
    from dataclasses import replace

    from page_primer.processes import ObjectStatus, ProcessStatus

    obj = ObjectStatus("/lib/a", None, 0, 0, 2 * MIB, 9 * MIB, 0, 0, 0, 0, 0)
    limited = ProcessStatus(1, 0, "python", (obj,), 2 * MIB, lock_limit=8 * MIB)
    assert limited.unlocked.startswith("7.0 MiB of 9.0 MiB not locked: RLIMIT_MEMLOCK is 8.0 MiB; ")
    assert "LimitMEMLOCK=256M" in limited.unlocked
    # A part of the limit is left to the application.
    assert replace(limited, lock_limit=10 * MIB).unlocked
    # What was loaded since, or is left out, is nothing to be said.
    assert replace(limited, lock_limit=11 * MIB).unlocked is None
    assert replace(limited, lock_limit=None).unlocked is None
    # Nor is the limit to blame where nothing was asked for.
    unprimed = replace(limited, objects=(replace(obj, locked_bytes=0),))
    assert unprimed.unlocked is None
    assert unprimed.added == "unprimed: nothing of its code was moved or locked"
    assert limited.added is None


def test_status_says_what_priming_added_and_of_whom_it_is_not(python, images):
    with Process(python) as process:
        assert "unprimed: " in status(process.pid).stdout
        report = process.prime(image_dir=str(images))
        if not report["copied_bytes"]:
            pytest.skip("nothing has to be copied here")
        text = status(process.pid).stdout
        assert "unprimed" not in text
        (line,) = [line.strip() for line in text.splitlines() if "copied: " in line]
        whole = f"{report['copied_bytes'] / MIB:.1f} MiB"
        assert line.startswith(f"copied: {whole}, of which {whole} resident, ")
        # A second process maps the same.
        with Process(python) as other:
            again = other.prime(image_dir=str(images))
            (found,) = json.loads(status("--json", process.pid).stdout)
            if again["shared_bytes"] == report["copied_bytes"]:
                # Of a program, a page that core files need is private (_dump.c).
                assert found["copied_bytes"] - found["copied_shared_bytes"] <= 64 << 10
                assert found["copied_private_bytes"] <= 64 << 10
            assert found["primed"]
