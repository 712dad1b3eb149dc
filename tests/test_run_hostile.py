"""What commands, environments and other launchers may do to `page-primer run`."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from harness.launched import LAUNCHER
from harness.privileges import BACKING

ROOT = Path(__file__).parents[1]


def execute(*command, env=None, **keywords):
    return subprocess.run(
        command, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False, **keywords,
    )  # fmt: skip


@pytest.fixture
def run(images):
    """`page-primer run` with a store of its own."""

    def run(*command, env=None, **keywords):
        environment = {"PAGE_PRIMER_IMAGE_DIR": str(images), **(env or {})}
        return execute(LAUNCHER, "run", "--", *command, env=environment, **keywords)

    return run


SCRIPTS = {
    "without-interpreter": b'echo "$0" "$@"\n',
    "empty": b"",
    "carriage-return": b"#!%s\r\nprint(1)\r\n",
    "option-carriage-return": b"#!/usr/bin/env python3\r\nprint(1)\r\n",
    "no-break-space": b"#!%s\xc2\xa0\nprint(1)\n",
    "vertical-tab": b"#!%s\v-B\nprint(1)\n",
    "nul": b"#!%s\0abc\nprint(1)\n",
    "spaces": b"#! \t%s\t -B \nimport sys; print(sys.orig_argv)\n",
    "cut-off": b"#!%s -B" + b"B" * 400 + b"\nimport sys; print(sys.orig_argv)\n",
    "no-interpreter": b"#!  \n",
    "missing": b"#!/nonexistent/python\n",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_as_without_us(run, python, tmp_path, name):
    script = tmp_path / name
    script.write_bytes(SCRIPTS[name].replace(b"%s", os.fsencode(python)))
    script.chmod(0o755)
    plain = execute("/usr/bin/env", str(script), "a", "b c", "")
    done = run(str(script), "a", "b c", "")
    assert (done.returncode, done.stdout) == (plain.returncode, plain.stdout), done.stderr
    assert bool(done.stderr) == bool(plain.stderr)


@pytest.mark.parametrize("name", ["not-executable", "directory", "missing", "fifo", ""])
def test_what_cannot_be_executed(run, tmp_path, name):
    (tmp_path / "not-executable").write_text("x")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo", 0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert run(name, env=path).returncode == execute("/usr/bin/env", name, env=path).returncode


def test_an_empty_entry_of_path_is_the_current_directory(run, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "python3").chmod(0o755)
    for path in (f":{os.environ['PATH']}", ""):
        assert run("python3", env={"PATH": path}, cwd=tmp_path).stdout == "here\n"


def test_the_first_in_path_is_executed(run, tmp_path):
    """Also when it is a script without an interpreter; what may not be executed is passed over."""
    for number, (mode, text) in enumerate([(0o644, ""), (0o755, "echo first\n"), (0o755, "")]):
        (tmp_path / str(number)).mkdir()
        script = tmp_path / str(number) / "command"
        script.write_text(text)
        script.chmod(mode)
    path = ":".join(f"{tmp_path}/{name}" for name in ("missing", "0", "1", "2"))
    assert run("command", env={"PATH": path}).stdout == "first\n"
    assert run("command", env={"PATH": f"{tmp_path}/0:{tmp_path}/missing"}).returncode == 126


def test_two_installations_prime_once(run, python, tmp_path):
    other = tmp_path / "other" / "page_primer"
    shutil.copytree(ROOT / "page_primer", other)
    env = {"PYTHONPATH": str(other / "launcher" / "site"), "PAGE_PRIMER_VERBOSE": "1"}
    done = run(python, "-c", "print(1)", env=env)
    # One line from the launcher's own start, by the other installation, and one from the program.
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (0, "1\n", 2), done.stderr


def test_a_package_without_its_core(python, tmp_path):
    """A free-threaded interpreter cannot import it: the program runs as it would."""
    package = tmp_path / "page_primer"
    shutil.copytree(ROOT / "page_primer", package, ignore=shutil.ignore_patterns("*.so"))
    source = "import sys, zlib; print('page_primer.launcher.imports' in sys.modules)"
    environment = {"PYTHONPATH": str(package / "launcher" / "site"), "PAGE_PRIMER_VERBOSE": "1"}
    done = execute(python, "-c", source, env=environment)
    assert (done.returncode, done.stdout) == (0, "False\n")
    (line,) = done.stderr.splitlines()
    assert "not available here" in line


def test_the_c_locale_stays(run, python):
    """An interpreter sets LC_CTYPE there, and the next one would not see the C locale."""
    ask = "import os, sys; print(sys.flags.utf8_mode, os.environ.get('LC_CTYPE'))"
    names = [n for n in os.environ if n == "LANG" or n.startswith("LC_")]
    command = ["env", *(f"-u{name}" for name in names)]
    plain = execute(*command, python, "-c", ask).stdout
    shell = ["sh", "-c", f'{python} -c "$1"; echo "$LC_CTYPE"', "sh", ask]
    assert run(*command, python, "-c", ask).stdout == plain
    assert execute(*command, LAUNCHER, "run", *shell).stdout == plain + "\n"


def test_signals_are_not_ignored_for_others():
    """Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays so over exec. These two get
    their defaults, what others the caller ignores (nohup: SIGHUP) stays ignored."""
    show = ["sh", "-c", "grep SigIgn /proc/self/status"]
    for names in ("", "HUP", "HUP INT TERM"):
        trap = ["sh", "-c", f'[ -z "{names}" ] || trap "" {names}; exec "$@"', "sh"]
        assert execute(*trap, LAUNCHER, "run", *show).stdout == execute(*trap, *show).stdout
    trap = ["sh", "-c", 'trap "" PIPE XFSZ; exec "$@"', "sh"]
    assert execute(*trap, LAUNCHER, "run", *show).stdout == execute(*show).stdout
    inside = ["sh", "-c", 'trap "" PIPE; exec "$@"', "sh", *show]
    assert execute(LAUNCHER, "run", *inside).stdout == execute(*inside).stdout


# What shells and service managers do to descriptors and limits. Each is compared with the same
# command without page-primer.


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("program", ["python", "shell", "missing", "directory"])
@pytest.mark.parametrize("limit", ["ulimit -f 0", "exec 2>/dev/full", "closed pipe", "closed"])
def test_exit_status_under_limits(images, tmp_path, python, limit, program, unbuffered):
    """Under -v, so that each process has something to say where nothing can be said."""
    command = {
        "python": [python, "-c", "import os; os.write(1, b'ran'); exit(5)"],
        "shell": ["sh", "-c", "printf ran; exit 5"],
        "missing": ["/nonexistent"],
        "directory": [str(tmp_path)],
    }[program]
    expected = {"missing": (127, b""), "directory": (126, b"")}.get(program, (5, b"ran"))
    # With a file in the list, `run` goes through page-primer-warm, whose words may have no place.
    (tmp_path / "aligned").write_text("/nonexistent\n" * bool(unbuffered))
    env = {**os.environ, "PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONUNBUFFERED": unbuffered,
           "PAGE_PRIMER_ALIGNED": str(tmp_path / "aligned")}  # fmt: skip
    set_up = {"closed pipe": ":", "closed": "exec 2>&-"}.get(limit, limit)
    script = f'ulimit -c 0; {set_up}; exec "$@"'
    reader, writer = os.pipe()
    os.close(reader)
    try:
        for before in ([], [LAUNCHER, "run", "-v", "--"]):
            if not before and program in ("missing", "directory"):
                continue  # the shell's own words
            done = subprocess.run(
                ["sh", "-c", script, "sh", *before, *command], env=env, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, timeout=60, check=False,
                stderr=writer if limit == "closed pipe" else subprocess.PIPE,
            )  # fmt: skip
            assert (done.returncode, done.stdout) == expected, (before, done.stderr)
    finally:
        os.close(writer)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_descriptors(images, tmp_path, python, closed):
    """The user's own sitecustomize runs, whatever can be said of ours; and nothing of what would
    have been said lands elsewhere."""
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.seen = True")
    out = tmp_path / "out"
    source = f"assert seen; open({str(out)!r}, 'w').write('ran')"
    environment = {
        "PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONPATH": str(tmp_path),
        "PAGE_PRIMER_VERBOSE": "1",
    }  # fmt: skip
    script = f'exec "$@" {closed}'
    done = execute("sh", "-c", script, "sh", LAUNCHER, "run", python, "-c", source, env=environment)
    assert (done.returncode, done.stdout, out.read_text()) == (0, "", "ran"), done.stderr


@pytest.mark.root("make a mount namespace")
def test_without_proc(run, python, images):
    script = 'umount -l /proc; exec "$@"'
    done = execute("unshare", "-m", "sh", "-c", script, "sh", LAUNCHER, "run", python, "-c",
                   "print(1)", env={"PAGE_PRIMER_IMAGE_DIR": str(images)})  # fmt: skip
    assert done.stdout == "1\n", done.stderr


@pytest.mark.parametrize("version", ["2.7", "3.8"])
def test_old_pythons_are_left_alone(run, version):
    found = list(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    if not found:
        pytest.skip(f"no Python {version} here")
    ask = "import sys; print(sorted(sys.modules), sys.path)"
    # Python 2 would leave a .pyc beside our sitecustomize.py.
    done = run(str(found[0]), "-c", ask, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert (done.stdout, done.stderr) == (execute(str(found[0]), "-c", ask).stdout, "")


def test_a_path_before_ours_is_no_obstacle(run, python, tmp_path):
    script = f'PYTHONPATH={tmp_path}:$PYTHONPATH exec "$@"'
    source = "import page_primer; print(page_primer.prime().interpreter.backing)"
    assert run("sh", "-c", script, "sh", python, "-c", source).stdout == f"{BACKING}\n"


def test_what_memory_forbids_is_not_loaded_after_all(python):
    """Where prime() declines for want of memory, nothing that a started process does after it
    imports what that would have taken."""
    source = (
        "import sys\n"
        "import page_primer.kernel.memory\n"
        "page_primer.kernel.memory.WORKING = 1 << 60\n"
        "from page_primer.launcher import child as started\n"
        "started.start()\n"
        "print(sorted(name for name in sys.modules if name.startswith('page_primer.')))"
    )
    done = execute(python, "-c", source, env={"PAGE_PRIMER_VERBOSE": "1"})
    assert "nothing done: too little memory" in done.stderr
    assert "page_primer.kernel.memory" in done.stdout
    assert "page_primer.apply.process" not in done.stdout and "_core" not in done.stdout
