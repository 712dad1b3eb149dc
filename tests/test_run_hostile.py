"""What commands, environments and other launchers may do to `page-primer run`."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import INTERPRETERS

from page_primer import elf, starts

ROOT = Path(__file__).parents[1]
LAUNCHER = str(Path(sys.executable).with_name("page-primer"))
SHARED = next(
    (p for p in INTERPRETERS.values() if b"libpython" in Path(os.path.realpath(p)).read_bytes()),
    None,
)
ENVIRONMENT = """
import os, sys
with open("/proc/self/maps") as maps:
    native = "-native-" in maps.read()
with open("/proc/self/comm") as comm:
    name = comm.read().strip()
left = [n for n in os.environ if n == "LD_PRELOAD" or n == "PAGE_PRIMER_STARTED"]
print(native, name, left)
"""


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


@pytest.fixture
def shared():
    if SHARED is None:
        pytest.skip("no interpreter here has a libpython of its own")
    return SHARED


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
    """First by way of Python, then by way of what was found out."""
    script = tmp_path / name
    script.write_bytes(SCRIPTS[name].replace(b"%s", os.fsencode(python)))
    script.chmod(0o755)
    plain = execute("/usr/bin/env", str(script), "a", "b c", "")
    for _ in range(2):
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
        for _ in range(2):
            assert run("python3", env={"PATH": path}, cwd=tmp_path).stdout == "here\n"


@pytest.mark.parametrize("option", ["-I", "-E", "-S", "-uBE", "-Wignore", "-sc", "-Xdev"])
def test_what_starting_natively_leaves_is_put_right(run, shared, option):
    """-E, -I and -S keep our sitecustomize out, which would."""
    words = [option] if option.endswith("c") else [option, "-c"]
    for _ in range(2):
        done = run(shared, *words, ENVIRONMENT, env={"PYTHONWARNINGS": ""})
        native, name, left = done.stdout.split(maxsplit=2)
        assert (name, left) == (os.path.basename(shared)[:15], "[]\n"), done.stderr
        assert native == str(option in ("-Wignore", "-sc", "-Xdev"))


def test_is_isolated():
    for words in (["-c", "-I"], ["-W", "-I", "x"], ["-WI"], ["-", "-I"], ["x", "-I"], ["-X", "-E"]):
        assert not starts.is_isolated(["python", *words]), words
    for words in (["-I"], ["-bE"], ["-W", "x", "-S"], ["--check-hash-based-pycs", "x", "-I"]):
        assert starts.is_isolated(["python", *words]), words


def test_two_installations_do_not_start_each_other_for_ever(run, shared, tmp_path):
    other = tmp_path / "other" / "page_primer"
    shutil.copytree(ROOT / "page_primer", other)
    for _ in range(2):
        done = run(shared, "-c", "print(1)", env={"PYTHONPATH": str(other / "site")})
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_without_the_core_nothing_is_left_either(run, shared, tmp_path):
    """A free-threaded interpreter cannot import it."""
    assert run(shared, "-c", "").returncode == 0
    package = tmp_path / "page_primer"
    shutil.copytree(ROOT / "page_primer", package, ignore=shutil.ignore_patterns("*.so"))
    image = next((tmp_path / "images").glob("*-native-*/lib*"))
    environment = {"PYTHONPATH": str(package / "site"), "LD_PRELOAD": str(image)}
    done = execute(shared, "-c", ENVIRONMENT, env=environment)
    assert done.stdout.split(maxsplit=2)[2] == "[]\n", done.stderr


def test_the_c_locale_stays(run, python):
    """An interpreter sets LC_CTYPE there, and the next one would not see the C locale."""
    ask = "import os, sys; print(sys.flags.utf8_mode, os.environ.get('LC_CTYPE'))"
    names = [n for n in os.environ if n == "LANG" or n.startswith("LC_")]
    command = ["env", *(f"-u{name}" for name in names)]
    plain = execute(*command, python, "-c", ask).stdout
    shell = ["sh", "-c", f'{python} -c "$1"; echo "$LC_CTYPE"', "sh", ask]
    for _ in range(2):
        assert run(*command, python, "-c", ask).stdout == plain
        assert run(*command, LAUNCHER, "run", *shell).stdout == plain + "\n"


@pytest.mark.parametrize("ignored", [False, True])
def test_signals_are_not_ignored_for_others(run, ignored):
    """Python ignores SIGPIPE and SIGXFSZ, and an ignored signal stays so over exec."""
    show = ["sh", "-c", "grep SigIgn /proc/self/status"]
    trap = ["sh", "-c", 'trap "" PIPE; exec "$@"', "sh"] if ignored else []
    plain = execute(*trap, *show).stdout
    environment = {"PAGE_PRIMER_NATIVE": "1"}  # which takes it to the Python command
    assert execute(*trap, LAUNCHER, "run", *show, env=environment).stdout == plain
    assert execute(*trap, LAUNCHER, "run", *show).stdout == plain


def test_a_search_path_is_not_taken_for_others(run, shared, images):
    """Under LD_LIBRARY_PATH another library may be found than without it."""
    ask = "print(1)"
    assert run(shared, "-c", ask, env={"LD_LIBRARY_PATH": "/nonexistent"}).stdout == "1\n"
    assert not [p for p in images.glob(".starts/*") if "launcher" not in p.name]
    assert run(shared, "-c", ask).stdout == "1\n"
    assert [p for p in images.glob(".starts/*") if "launcher" not in p.name]


def test_a_directory_that_ld_preload_cannot_name(shared, tmp_path):
    environment = {"PAGE_PRIMER_IMAGE_DIR": str(tmp_path / "a b:c")}
    done = execute(LAUNCHER, "run", "--native", "--", shared, "-c", ENVIRONMENT, env=environment)
    assert done.stdout.startswith("False"), done.stderr
    assert "not a name for LD_PRELOAD" in done.stderr and "ld.so" not in done.stderr


def test_a_users_library_is_not_an_image():
    image = "/x/1-native-abc-12-200000-libpython3.11.so.1.0/libpython3.11.so.1.0"
    assert elf.is_native(image) and elf.is_native(f"{image} (deleted)")
    for path in ("/opt/my-native-libs/libx.so", "/opt/1-native-a-b-c-d/libx.so", "x", ""):
        assert not elf.is_native(path)


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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a mount namespace")
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
    ask = "import os; print(os.environ.get('LD_PRELOAD'))"
    for _ in range(2):
        done = run(str(found[0]), "-c", ask)
        assert (done.stdout, done.stderr) == ("None\n", ""), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_what_root_built_is_used_by_others():
    """A container is built as root and run as a user, who can write nothing there."""
    python = next((p for p in INTERPRETERS.values() if p.startswith("/usr/bin/")), None)
    if python is None:
        pytest.skip("no interpreter here that another user may run")
    with tempfile.TemporaryDirectory(prefix="page-primer-") as name:
        home, store = Path(name), f"{name}/store"
        home.chmod(0o755)
        shutil.copytree(ROOT / "page_primer", home / "page_primer")
        (home / "cache").mkdir()
        os.chown(home / "cache", 65534, 65534)
        built = execute(LAUNCHER, "build", "--python", python, store)
        assert built.returncode == 0, built.stderr
        ask = "import os; print(os.getuid(), os.readlink('/proc/self/exe'))"
        for _ in range(2):
            done = execute(
                "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
                python, "-m", "page_primer", "run", "--native", "--", python, "-c", ask, cwd=home,
                env={"PAGE_PRIMER_IMAGE_DIR": store, "XDG_CACHE_HOME": f"{home}/cache"},
            )  # fmt: skip
            assert done.stdout.split() == ["65534", built.stdout.split("\n")[0]], done.stderr
            assert done.stderr == ""
            assert list((home / "cache").glob("page-primer/.starts/*"))  # found out once
        # Not what somebody else could have written.
        os.chmod(store, 0o777)
        done = execute(
            "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
            python, "-m", "page_primer", "run", "--", python, "-c", ask, cwd=home,
            env={"PAGE_PRIMER_IMAGE_DIR": store, "XDG_CACHE_HOME": f"{home}/cache2"},
        )  # fmt: skip
        assert done.stdout.split() == ["65534", os.path.realpath(python)], done.stderr


def test_a_tracer_before_us_runs_once(run, python, tmp_path):
    """It puts itself first on PYTHONPATH, as ddtrace-run does, and imports ours in its midst."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "os.write(1, b'tracer ')\n"
        "directory = os.path.dirname(__file__)\n"
        "sys.path.remove(directory)\n"
        "mine = sys.modules.pop('sitecustomize')\n"
        "import sitecustomize\n"
        "sys.path.insert(0, directory)\n"
    )
    source = "import page_primer; print(page_primer.prime().interpreter.backing)"
    script = f'PYTHONPATH={tmp_path}:$PYTHONPATH exec "$@"'
    for _ in range(2):
        done = run("sh", "-c", script, "sh", python, "-c", source)
        assert done.stdout == "tracer image\n", done.stderr


def test_a_path_before_ours_is_no_obstacle(run, python, tmp_path):
    script = f'PYTHONPATH={tmp_path}:$PYTHONPATH exec "$@"'
    source = "import page_primer; print(page_primer.prime().interpreter.backing)"
    assert run("sh", "-c", script, "sh", python, "-c", source).stdout == "native\n"


def test_what_memory_forbids_is_not_loaded_after_all(python):
    """Where prime() declines for want of memory, nothing that a started process does after it
    imports what that would have taken."""
    source = (
        "import os, sys\n"
        "import page_primer.memory\n"
        "page_primer.memory.WORKING = 1 << 60\n"
        "os.environ['PAGE_PRIMER_STARTED'] = f'{os.getpid()} python'\n"
        "from page_primer import started\n"
        "started.start()\n"
        "print(sorted(name for name in sys.modules if name.startswith('page_primer.')))"
    )
    done = execute(python, "-c", source, env={"PAGE_PRIMER_VERBOSE": "1"})
    assert "nothing done: too little memory" in done.stderr
    assert "page_primer.memory" in done.stdout
    assert "page_primer.apply" not in done.stdout and "_core" not in done.stdout
