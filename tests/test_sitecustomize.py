"""Other sitecustomize files before and after ours, and other things that happen at an interpreter's
start: `.pth` files, programs that embed Python."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from harness.interpreters import KINDS, python_of
from harness.kernel import require_huge_files
from harness.launched import LAUNCHER, RUN, environment
from harness.privileges import has_images

import page_primer

SITE = str(Path(page_primer.__file__).parent / "launcher" / "site")


@pytest.fixture(autouse=True)
def _files_can_be_huge(tmp_path):
    require_huge_files(tmp_path)


def execute(*command, env, **options):
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        check=False, **options,
    )  # fmt: skip


# ---------------------------------------------------------------------------- a made-up tracer ---

# What tracers do to load the sitecustomize that comes after theirs, in the directories `rest`.
WAYS = {
    # New Relic's: its own module stays in sys.modules.
    "load_module": """
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec: spec.loader.load_module("sitecustomize")
""",
    "load_module of a new module": """
    mine = sys.modules.pop("sitecustomize")
    try:
        spec = PathFinder.find_spec("sitecustomize", rest)
        if spec: spec.loader.load_module("sitecustomize")
    finally:
        sys.modules.setdefault("sitecustomize", mine)
""",
    "exec_module": """
    spec = PathFinder.find_spec("sitecustomize", rest)
    if spec: spec.loader.exec_module(importlib.util.module_from_spec(spec))
""",
    # Datadog's.
    "import": """
    mine = sys.modules.pop("sitecustomize")
    try:
        import sitecustomize
    except ImportError as error:
        sys.modules["sitecustomize"] = mine
        if error.name != "sitecustomize": raise
""",
}
TRACER = """
import importlib.util, os, sys
from importlib.machinery import PathFinder
print("tracer", flush=True)
here = os.path.dirname(__file__)
sys.path.remove(here)
rest = list(sys.path)
try:
    pass%s
except BaseException as error:
    print("failed:", type(error).__name__, error, flush=True)
print("tracer's end", "sitecustomize" in sys.modules, flush=True)
"""
TELL = "import sys; print('sitecustomize' in sys.modules, sys.path)"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("own", [None, "print('mine')", "raise RuntimeError('mine')", "import no"])
@pytest.mark.parametrize("way", WAYS)
def test_a_tracer_before_ours(base, images, tmp_path, way, own):
    """It sees what it would see without ours, whether there is another one or not; the other runs
    once, and the process is primed."""
    (tmp_path / "tracer").mkdir()
    (tmp_path / "tracer/sitecustomize.py").write_text(TRACER % WAYS[way])
    users = []
    if own is not None:
        (tmp_path / "users").mkdir()
        (tmp_path / "users/sitecustomize.py").write_text(f"{own}\n")
        users = [str(tmp_path / "users")]
    tracer = str(tmp_path / "tracer")
    done = {}
    for name, paths in (("plain", [tracer, *users]), ("ours", [tracer, SITE, *users])):
        env = environment(images, PYTHONPATH=":".join(paths), PYTHONWARNINGS="ignore")
        done[name] = execute(base, "-c", f"{TELL}; {PRIMED}", env=env)
    assert done["plain"].stdout.startswith("tracer\n")
    if own == "print('mine')":
        assert done["plain"].stdout.count("mine") == 1
    plain, ours = (done[name].stdout.splitlines() for name in ("plain", "ours"))
    assert (plain.pop(), ours.pop()) == ("False", "True")
    assert ours == plain
    assert (done["ours"].returncode, done["ours"].stderr) == (0, done["plain"].stderr)


PRIMED = "import os; m = open('/proc/self/maps').read();"
MOVED = "f' {os.environ[\"PAGE_PRIMER_IMAGE_DIR\"]}/'" if has_images() else "' /memfd:page-primer'"
PRIMED += f"print({MOVED} in m)"


# ------------------------------------------------------------------------------- real tracers ---

TRACERS = {  # the command, a module of it, and whether it loads a sitecustomize after its own
    "newrelic": (["newrelic-admin", "run-program"], "newrelic.config", True),
    "ddtrace": (["ddtrace-run"], "ddtrace", True),
    "opentelemetry": (["opentelemetry-instrument"], "opentelemetry.instrumentation", False),
}
# A tracer's agent, which has nobody to report to here.
SILENT = {
    "NEW_RELIC_DEVELOPER_MODE": "true", "NEW_RELIC_LOG": "stderr", "NEW_RELIC_APP_NAME": "tests",
    "DD_TRACE_ENABLED": "false", "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false", "OTEL_SDK_DISABLED": "true",
    "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("order", ["tracer first", "page-primer first"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_real_tracer(images, tmp_path, tracer, order):
    """It traces, the process is primed, and the user's own sitecustomize runs as often as without
    page-primer. OpenTelemetry's loads no other, so ours must come first on PYTHONPATH."""
    command, module, chains = TRACERS[tracer]
    script = Path(sys.executable).with_name(command[0])
    if not script.exists():
        pytest.skip(f"{tracer} is not installed")
    command = [str(script), *command[1:]]
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nif sys.orig_argv[1] == '-c': os.write(1, b'mine\\n')\n"  # in no launcher
    )
    env = environment(images, PYTHONPATH=str(tmp_path), **SILENT)
    source = f"import sys; print({module!r} in sys.modules); {PRIMED}"
    program = [sys.executable, "-c", source]
    plain = execute(*command, *program, env=env)
    assert plain.stdout.splitlines()[-2:] == ["True", "False"], plain.stderr
    assert plain.stdout.count("mine") == int(chains)
    both = [*command, *RUN] if order == "tracer first" else [*RUN, *command]
    done = execute(*both, *program, env=env)
    reached = chains or order == "tracer first"
    assert done.stdout.splitlines()[-2:] == ["True", str(reached)], done.stderr
    assert done.stdout.count("mine") == int(chains)
    assert "Traceback" not in done.stderr and "KeyError" not in done.stderr


# --------------------------------------------------------------------------------- .pth files ---

# In what is started nothing more is: INNER is in its environment.
INNER = "dict(os.environ, INNER='1')"
PTH = {
    "a process": f"subprocess.run([sys.executable, '-c', 'print(1, flush=True)'], env={INNER})",
    "a fork": "os.waitpid(os.fork() or os._exit(0), 0)",
    "a thread": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
}


@pytest.mark.parametrize("what", PTH)
def test_a_pth_file_that_starts_something(base, images, tmp_path, what):
    """It does it as often as without page-primer, and the process is primed behind it."""
    python = python_of(tmp_path, base)
    log = tmp_path / "log"
    (packages,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
    count = f"open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')"
    modules = "os, subprocess, sys, threading, time"
    line = f"import {modules}; {count}; 'INNER' in os.environ or {PTH[what]}\n"
    (packages / "starts.pth").write_text(line)
    program = [python, "-c", f"print('program', flush=True); {PRIMED}"]
    found = []
    for before in ([], RUN):
        done = execute(*before, *program, env=environment(images))
        assert done.returncode == 0, done.stderr
        found.append((done.stdout.splitlines(), done.stderr, len(log.read_text().splitlines())))
        log.unlink()
    (plain, plain_err, plain_starts), (ours, ours_err, ours_starts) = found
    assert plain_starts  # how often is a matter of the version: some read them twice
    assert (plain.pop(), ours.pop()) == ("False", "True")
    assert (ours, ours_err, ours_starts) == (plain, plain_err, plain_starts)


COLLECTING = """
import gc, sys, threading, time
def hook(event, arguments):
    if event == "import" and arguments[0] == "page_primer.launcher.child":
        sys.collected = gc.isenabled()
        {then}
def start():
    sys.addaudithook(hook)
    {start}
"""


@pytest.mark.parametrize("then", ["pass", "raise RuntimeError"])
@pytest.mark.parametrize("start", ["pass", PTH["a thread"]])
def test_the_collector_rests_where_no_other_thread_runs(base, images, tmp_path, start, then):
    """It is on again afterwards, whatever happened."""
    python = python_of(tmp_path, base)
    (packages,) = (tmp_path / "venv").glob("lib/python3.*/site-packages")
    (packages / "looks.py").write_text(COLLECTING.format(start=start, then=then))
    (packages / "starts.pth").write_text("import looks; looks.start()\n")
    program = [python, "-c", f"import gc, sys; print(sys.collected, gc.isenabled()); {PRIMED}"]
    done = execute(*RUN, *program, env=environment(images))
    others, primed = str(start != "pass"), str(then == "pass")
    assert done.stdout.splitlines() == [f"{others} True", primed], done.stderr


# ----------------------------------------------------------------------------- embedded Python ---

EMBEDDING = """
#include <Python.h>
#include <unistd.h>
int main(int argc, char **argv)
{
    (void)argc;
    PyConfig config;
    if (argv[1][0] == 'i')
        PyConfig_InitIsolatedConfig(&config);
    else
        PyConfig_InitPythonConfig(&config);
    config.install_signal_handlers = 0; /* so SIGPIPE and SIGXFSZ are what they are for C */
    PyConfig_SetBytesString(&config, &config.home, argv[2]);
    PyConfig_SetBytesString(&config, &config.program_name, argv[3]);
    PyStatus status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        Py_ExitStatusException(status);
    int failed = PyRun_SimpleString(argv[4]);
    return Py_FinalizeEx() ? 120 : failed ? 1 : 7;
}
"""


@pytest.fixture(scope="module")
def embedding(request, tmp_path_factory):
    """A program that embeds Python: the start of its command."""
    python = KINDS.get("shared") or request.getfixturevalue("debian_shared")
    ask = (
        "import sys, sysconfig as s; print(s.get_path('include'), s.get_config_var('LIBDIR'),"
        "s.get_config_var('LDVERSION'), sys.base_prefix)"
    )
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True)
    include, libraries, version, prefix = done.stdout.split()
    if not Path(include, "Python.h").exists():
        pytest.skip(f"no headers of {python}")
    directory = tmp_path_factory.mktemp("embedding")
    source = directory / "embedding.c"
    source.write_text(EMBEDDING)
    program = directory / "embedding"
    subprocess.run(
        ["gcc", "-o", str(program), str(source), f"-I{include}", f"-L{libraries}",
         f"-Wl,-rpath,{libraries}", f"-lpython{version}"], check=True,
    )  # fmt: skip
    return [str(program), prefix, python]


def embedded(embedding, form, code):
    program, prefix, python = embedding
    return [program, form, prefix, python, code]


def test_a_program_that_embeds_python(embedding, images):
    code = "import sys; print('program', 'sitecustomize' in sys.modules); " + PRIMED
    for form, primed in (("python", "True"), ("isolated", "False")):
        command = embedded(embedding, form, code)
        plain = execute(*command, env=environment(images))
        done = execute(*RUN, *command, env=environment(images))
        first, plainly = plain.stdout.splitlines()
        assert (first[:8], plainly) == ("program ", "False"), plain.stderr
        assert done.stdout.splitlines() == [first, primed], done.stderr
        assert (done.returncode, done.stderr) == (plain.returncode, plain.stderr)


@pytest.mark.parametrize("limit", ["ulimit -f 0", "closed pipe", "exec 2>/dev/full"])
def test_an_embedding_program_under_limits(embedding, images, limit):
    """It has SIGPIPE and SIGXFSZ at their defaults, and must not die of what we write."""
    command = embedded(embedding, "python", "print('program', flush=True)")
    script = f'ulimit -c 0; {":" if limit == "closed pipe" else limit}; exec "$@"'
    # Without, importing a module that is not compiled yet is fatal: ours as anybody's.
    env = environment(images, PYTHONDONTWRITEBYTECODE="1")
    for before in ([], [LAUNCHER, "run", "-v", "--"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            ["sh", "-c", script, "sh", *before, *command], env=env, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, timeout=60, check=False,
            stderr=writer if limit == "closed pipe" else subprocess.PIPE,
        )  # fmt: skip
        os.close(writer)
        assert (done.returncode, done.stdout) == (7, b"program\n"), done.stderr


def test_without_a_directory_of_ours(python, tmp_path, images):
    """The package was removed behind a running server: its children start as without it."""
    package = tmp_path / "page_primer"
    shutil.copytree(Path(page_primer.__file__).parent, package)
    for path in package.glob("*.py"):
        path.unlink()
    plain = execute(python, "-c", TELL, env=environment(images))
    env = environment(images, PYTHONPATH=str(package / "launcher" / "site"))
    done = execute(python, "-c", TELL, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain.stdout, "")
    done = execute(python, "-c", TELL, env={**env, "PAGE_PRIMER_VERBOSE": "1"})
    assert re.fullmatch(r"page-primer: FileNotFoundError: .*\n", done.stderr)
    assert sysconfig.get_path("stdlib") in done.stdout
