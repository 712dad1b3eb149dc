"""`page-primer run`: real servers and programs, looked at from outside."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import outside
from harness.gunicorn_server import Gunicorn
from harness.interpreters import KINDS, python_of
from harness.kernel import require_huge_files
from harness.launched import LAUNCHER, RUN, check_primed, environment, is_primed, run
from harness.placement import require_one_address
from harness.privileges import has_images, locks_fit
from harness.servers import (
    NO_CONTROL_SOCKET,
    Server,
    children,
    free_port,
    patient_uvicorn,
    wait_for,
)

from page_primer.images import trust

APP = """
import os
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    await receive()
    headers = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})
def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]
"""


@pytest.fixture(autouse=True)
def _files_can_be_huge(tmp_path):
    require_huge_files(tmp_path)


def both(command, images, **options):
    """What a command says without the launcher, and with it: without an image there, with it, and
    below a shell."""
    plain = run(command, **options)
    first, again = (run(command, images, **options) for _ in range(2))
    inner = run(["sh", "-c", '"$@"', "sh", *command], images, **options)
    return plain, [first, again, inner]


# ------------------------------------------------------------------------------------ servers ---


def http(module, *options):
    return lambda python, port, _: [python, "-m", module, *(o.format(port) for o in options)]


SERVERS = {  # command, and processes at least
    "gunicorn": (
        http("gunicorn", "-w", "2", "--bind", "127.0.0.1:{}", *NO_CONTROL_SOCKET, "served:wsgi"),
        3,
    ),
    # The parent, multiprocessing's resource tracker, and the workers.
    "uvicorn": (
        http("uvicorn", "--workers", "4", *patient_uvicorn(), "--port", "{}", "served:app"),
        6,
    ),
    "hypercorn": (http("hypercorn", "-w", "2", "--bind", "127.0.0.1:{}", "served:app"), 3),
    "granian": (
        http("granian", "--interface", "asgi", "--workers", "2", "--port", "{}", "served:app"),
        3,
    ),
}


def require_module(python, name):
    done = subprocess.run([python, "-c", f"import {name}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{name} is not to be had under {python}: {done.stderr.splitlines()[-1]}")


@pytest.mark.slow
@pytest.mark.parametrize("name", SERVERS)
def test_servers(kind, images, tmp_path, name):
    require_module(kind, name)
    (tmp_path / "served.py").write_text(APP)
    port = free_port()
    make, count = SERVERS[name]
    command = [*RUN, *make(kind, port, tmp_path)]
    with Server(tmp_path, port, *command, env=environment(images, PYTHONPATH=".")) as server:
        wait_for(
            lambda: len(server.family()) >= count and all(map(is_primed, server.family())),
            "all processes",
        )
        texts = check_primed(server.family())
        assert int(server.get()) in server.family()
        assert len({text.path for text in texts}) == 1
        outside.require_one_copy(texts)
    assert server.process.returncode in (0, -signal.SIGTERM), server.log()


class Worker(Server):
    """A worker that serves a queue; it is there when it says so."""

    def __init__(self, ready, *arguments, **options):
        self.ready = ready
        super().__init__(*arguments, **options)

    def get(self, path=""):
        return (path or self.ready) in self.log()


@pytest.mark.slow
def test_celery(kind, images, tmp_path, broker):
    require_module(kind, "celery, redis")
    (tmp_path / "work.py").write_text(
        "from celery import Celery\nimport os\n"
        "app = Celery('work', broker=os.environ['BROKER'], backend=os.environ['BROKER'])\n"
        "@app.task\ndef pid(): return os.getpid()\n"
    )
    env = environment(images, BROKER=f"{broker}/13", C_FORCE_ROOT="1")
    command = [*RUN, kind, "-m", "celery", "-A", "work", "worker", "-c", "2", "-l", "INFO"]
    with Worker(" ready.", tmp_path, 0, *command, env=env) as worker:
        wait_for(lambda: len(worker.family()) == 3, "the pool")
        check_primed(worker.family())
        code = "import work; print(work.pid.delay().get(timeout=20))"
        answer = run([kind, "-c", code], env=env, cwd=tmp_path)
        assert int(answer.stdout) in children(worker.pid), answer.stderr
    assert worker.process.returncode == 0, worker.log()


@pytest.mark.slow
def test_rq(kind, images, tmp_path, broker):
    """A horse is forked for each job."""
    require_module(kind, "rq")
    (tmp_path / "work.py").write_text(
        "import os, pathlib, time\n"
        "def job():\n"
        "    pathlib.Path('horse').write_text(str(os.getpid()))\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.05)\n"
    )
    env = environment(images, PYTHONPATH=".")
    url = f"{broker}/14"
    command = [*RUN, kind, "-m", "rq.cli", "worker", "--burst", "--url", url]
    queue = (
        "import redis, rq, work\n"
        f"rq.Queue(connection=redis.Redis.from_url({url!r})).enqueue(work.job)\n"
    )
    assert run([kind, "-c", queue], env=env, cwd=tmp_path).returncode == 0
    with Worker("work.job", tmp_path, 0, *command, env=env) as worker:
        horse = tmp_path / "horse"
        wait_for(lambda: horse.exists() and horse.read_text(), "the job")
        pids = worker.family()
        assert int(horse.read_text()) in pids[1:]
        check_primed(pids)
        (tmp_path / "go").touch()
        worker.process.wait(30)
    assert worker.process.returncode == 0, worker.log()


def test_every_interpreter(every_python, images):
    """A plain script, by itself and below a shell."""
    code = "import sys; print(sys.prefix, flush=True); sys.stdin.read()"
    expected = run([every_python, "-c", code], stdin=subprocess.DEVNULL).stdout
    for before in ([], [], ["sh", "-c", '"$@"; :', "sh"]):
        with subprocess.Popen(
            [*RUN, *before, every_python, "-c", code], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=environment(images), text=True,
        ) as process:  # fmt: skip
            assert process.stdout.readline() == expected
            pids = children(process.pid) if before else [process.pid]
            (text,) = check_primed(pids)
            if text.attainable == text.size and has_images():
                assert text.huge == text.size
            process.stdin.close()
        assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "late", "moved"),
    [([], "", True), (["--no-late"], "", False), ([], "0", False), (["--late"], "0", True)],
    ids=["default", "--no-late", "PAGE_PRIMER_LATE=0", "--late"],
)
def test_a_library_that_comes_late(python, images, options, late, moved):
    """An extension module brings libcrypto, which has room for a huge page."""
    code = "import ssl; print(flush=True); input()"
    env = environment(images, PAGE_PRIMER_LATE=late)
    with subprocess.Popen(
        [LAUNCHER, "run", *options, "--", python, "-c", code], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=env,
    ) as process:  # fmt: skip
        process.stdout.readline()
        check_primed([process.pid])
        found = next(
            v.path for v in outside.smaps(process.pid) if "libcrypto" in v.path and "w" in v.perms
        )
        text = outside.text_of(process.pid, found)
        assert text.attainable > 0 or text.phase, text
        # What of it is hot by then: a part, or all of it; at a random address perhaps nothing.
        if moved:
            assert text.huge or text.phase, text
            assert text.locked or not locks_fit(), text
        else:
            assert not text.locked, text
        process.communicate(b"\n")


def test_verbose_speaks_for_late_libraries_and_forked_children(python, images):
    code = (
        "import os, ssl\n"
        "child = os.fork()\n"
        "if not child: os._exit(0)\n"
        "os.waitpid(child, 0); print(os.getpid(), child)"
    )
    done = run([LAUNCHER, "run", "-v", "--", python, "-c", code], env=environment(images))
    parent, child = done.stdout.split()
    told = [line for line in done.stderr.splitlines() if line.startswith("page-primer[")]
    of_parent = [line for line in told if line.startswith(f"page-primer[{parent}]: ")]
    assert len(of_parent) >= 2, "at its start, and for libcrypto"
    (line,) = [line for line in told if line.startswith(f"page-primer[{child}]: ")]
    assert line.startswith(f"page-primer[{child}]: forked from {parent}, ")
    assert line.endswith(" MiB locked again")


# ------------------------------------------------------------------------------- pass-through ---

TELL = """
import gc, json, os, signal, sys
print(json.dumps([
    sys.argv, sys.orig_argv, sys.stdin.read(), sys.executable, sys.prefix, sys.base_prefix,
    sys.path, sorted(n for n in sys.modules if "sitecustomize" in n), sys.flags.utf8_mode,
    open("/proc/self/comm").read(), os.environ.get("LC_CTYPE"),
    [str(signal.getsignal(n)) for n in (signal.SIGPIPE, signal.SIGHUP, signal.SIGINT)],
    sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))),
    os.getcwd(), gc.isenabled(), gc.get_threshold(),
]))
sys.exit(7)
"""
ODD = ["a b", "it's", '"q"', "", "*", "$HOME", "--", "-c", "\\", "é", "new\nline", "--help", "-v"]


def test_arguments_stdin_and_exit_status(kind, images, tmp_path):
    script = tmp_path / "a script.py"
    script.write_text(TELL)
    plain, others = both([kind, str(script), *ODD], images, input="some\ninput", cwd=tmp_path)
    assert plain.returncode == 7, plain.stderr
    assert json.loads(plain.stdout)[0][1:] == ODD
    for other in others:
        assert (other.returncode, other.stdout, other.stderr) == (7, plain.stdout, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        ["env", "-i", f"HOME={os.environ.get('HOME', '/')}"],
        ["env", "-u", "LANG", "LC_ALL=C"],
        ["env", "-u", "LANG", "-u", "LC_ALL", "LC_CTYPE=C"],
        ["sh", "-c", "trap '' PIPE HUP INT; exec \"$@\"", "sh"],
    ],
    ids=["no environment", "C", "LC_CTYPE", "ignored signals"],
)
def test_what_a_process_inherits(kind, images, tmp_path, before):
    script = tmp_path / "script.py"
    script.write_text(TELL)
    command = [kind, str(script)]
    plain = run([*before, *command], stdin=subprocess.DEVNULL)
    assert plain.returncode == 7, plain.stderr
    # `env -i` takes the directory as well: give it where the launcher starts.
    place = ["env", f"PAGE_PRIMER_IMAGE_DIR={images}"]
    for inner in ([], [], ["sh", "-c", '"$@"', "sh"]):
        launched = [*before, *place, *RUN, *inner, *command]
        other = run(launched, stdin=subprocess.DEVNULL)
        assert (other.returncode, other.stdout) == (7, plain.stdout), other.stderr


def test_other_programs_are_left_alone(images):
    """Environment and signals are the same, but for the variables that tell of us."""
    shown = "grep -E 'Sig(Ign|Cgt)' /proc/$$/status; env -u PYTHONPATH -u _; ulimit -a"
    command = ["sh", "-c", shown]
    plain, others = both(command, images)
    for other in others[:2]:
        ours = [line for line in other.stdout.splitlines() if "PAGE_PRIMER" not in line]
        assert ours == plain.stdout.splitlines()
        assert other.stderr == ""
    for name, status in (("/nonexistent", 127), ("no-such-command", 127), ("/etc/passwd", 126)):
        done = run([name], images)
        assert done.returncode == status
        assert len(done.stderr.splitlines()) == 1 and name in done.stderr


def test_the_program_from_stdin(kind, images):
    plain, others = both([kind, "-", "x"], images, input="import sys\nprint(sys.argv)\nexit(3)\n")
    assert plain.stdout == "['-', 'x']\n"
    for other in others:
        assert (other.returncode, other.stdout, other.stderr) == (3, plain.stdout, "")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals(kind, images, number):
    """The launcher's process is the program's: what is sent to it arrives."""
    run([kind, "-c", ""], images)
    handler = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\n"
        # Whoever runs the tests in the background may have it ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "print(flush=True)\n"
        "while True: time.sleep(0.05)"
    )
    codes = []
    for command in ([kind, "-c", handler], [*RUN, kind, "-c", handler]):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(images)
        ) as process:
            process.stdout.readline()
            process.send_signal(number)
        codes.append(process.returncode)
    assert codes[0] == codes[1] != 0


def test_off_switch(kind, images, tmp_path):
    """A plain exec: the same environment, the same file, nothing written."""
    code = (
        "import os; print(sorted(os.environ.items()), os.readlink('/proc/self/exe'));"
        "print(open('/proc/self/maps').read().count('page-primer'))"
    )
    command = [kind, "-c", code]
    env = {"PAGE_PRIMER": "0", "PAGE_PRIMER_IMAGE_DIR": str(images), "PYTHONPATH": str(tmp_path)}
    plain = run(command, env=env)
    other = run(command, images, env=env)
    assert (other.returncode, other.stdout, other.stderr) == (0, plain.stdout, "")
    assert not images.exists()


@pytest.mark.slow
@pytest.mark.parametrize("own", [None, "print('mine')", "raise RuntimeError('mine')", "import no"])
def test_the_users_own_sitecustomize(kind, images, tmp_path, own):
    (tmp_path / "module.py").write_text("")
    if own is not None:
        # `page-primer` itself is a Python program with one, too.
        guard = "import sys\nif not sys.orig_argv[1].endswith('page-primer'):\n    "
        (tmp_path / "sitecustomize.py").write_text(guard + own + "\n")
    code = (
        "import os, sys, module; print(module.__file__, sys.path); "
        "own = sys.modules.get('sitecustomize'); print(own and own.__file__); "
        "print('page_primer' in ' '.join(sys.path))\n"
        "try:\n    import sitecustomize; print(sitecustomize.__file__)\n"
        "except Exception as e: print(e)"
    )
    env = {"PYTHONPATH": f"{tmp_path}:/nonexistent"}
    plain, others = both([kind, "-c", code], images, env=env)
    assert plain.stdout.startswith("mine" if own and "print" in own else str(tmp_path))
    for other in others:
        assert (other.returncode, other.stdout) == (0, plain.stdout)
        assert other.stderr == plain.stderr
        assert (other.stderr == "") == (own is None or "print" in own)


def test_the_environment_of_children(kind, images, tmp_path):
    """PYTHONPATH is kept, ours put before it once."""
    for before in ([], RUN):
        command = [*before, kind, "-c", "import os; os.system('echo $PYTHONPATH')"]
        done = run(command, images, env={"PYTHONPATH": "/one:/two"})
        assert re.fullmatch(r"[^:]*/page_primer/launcher/site:/one:/two\n", done.stdout), (
            done.stderr
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["env", "direct", "option"])
def test_scripts(kind, images, tmp_path, form):
    """The name of the process and what sys says are as without the launcher."""
    line = {"env": "/usr/bin/env python3", "direct": kind, "option": f"{kind} -B"}[form]
    script = tmp_path / "served"
    script.write_text(f"#!{line}\n{TELL}")
    script.chmod(0o755)
    env = {"PATH": f"{Path(kind).parent}:{os.environ['PATH']}"}
    for command in ([str(script), "a b"], ["./served"]):
        plain, others = both(command, images, env=env, cwd=tmp_path, input="")
        assert plain.returncode == 7, plain.stderr
        for other in others:
            assert (other.returncode, other.stdout, other.stderr) == (7, plain.stdout, "")


@pytest.mark.slow
def test_a_script_of_a_virtual_environment(images):
    """As pip writes it."""
    script = Path(sys.executable).with_name("gunicorn")
    plain, others = both([str(script), "--version"], images)
    assert plain.stdout.startswith("gunicorn")
    for other in others:
        assert other.stdout == plain.stdout


# -------------------------------------------------------------------------------- behaviour ---

BEHAVIOUR = """
import json, multiprocessing, os, shutil, site, subprocess, sys, sysconfig

def tell(number=0):
    return [
        number, sys.executable, sys._base_executable, sys.prefix, sys.base_prefix, sys.exec_prefix,
        sys.base_exec_prefix, sys.path[1:], site.getsitepackages(), site.ENABLE_USER_SITE,
        sysconfig.get_paths(), list(sys.flags), open("/proc/self/comm").read(),
        is_primed() if number else None,
    ]

def is_primed():
    place = os.environ.get("MOVED")
    return place is None or place in open("/proc/self/maps").read()

if __name__ == "__main__":
    found = {"self": tell()}
    for method in ("spawn", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found[method] = pool.map(tell, [1, 2])
    code = "import sys; print(sys.executable, sys.prefix, sys.base_prefix)"
    again = lambda python: subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True).stdout
    found["subprocess"] = again(sys.executable)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "new"], check=True)
    found["venv"] = [
        again("new/bin/python"), open("new/pyvenv.cfg").read(),
        sorted((n, os.readlink("new/bin/" + n)) for n in os.listdir("new/bin")
               if os.path.islink("new/bin/" + n)),
    ]
    if sys.argv[1:] == ["pip"]:
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--quiet",
             "--disable-pip-version-check", "--root-user-action", "ignore", "--no-build-isolation",
             "--use-pep517", "--target", "target", "./extension"], check=True)
        sys.path.insert(0, "target")
        import extension
        found["pip"] = [os.path.basename(extension.__file__), extension.answer()]
    print(json.dumps(found))
"""
EXTENSION = """
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "extension", "", 0, methods};
PyMODINIT_FUNC PyInit_extension(void) { return PyModule_Create(&module); }
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_an_interpreter_behaves_as_without(base, images, tmp_path, where):
    """Its paths and flags, children that are spawned or forked from a server, venv and pip, in a
    virtual environment and outside."""
    python = python_of(tmp_path, base) if where == "inside" else base
    script = tmp_path / "behaviour.py"
    script.write_text(BEHAVIOUR)
    moved = f" {images}/" if has_images() else " /memfd:page-primer"
    found = []
    for index, before in enumerate(([], RUN, RUN)):
        work = tmp_path / "work"
        work.mkdir()
        (work / "extension").mkdir()
        (work / "extension" / "extension.c").write_text(EXTENSION)
        (work / "extension" / "setup.py").write_text(
            "from setuptools import *\n"
            "setup(name='extension', ext_modules=[Extension('extension', ['extension.c'])])\n"
        )
        pip = ["pip"] if where == "inside" and has_headers(python) and index < 2 else []
        done = subprocess.run(
            [*before, python, str(script), *pip], cwd=work, text=True,
            capture_output=True, env=environment(images, MOVED=moved) if before else None,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found.append(json.loads(done.stdout))
        shutil.rmtree(work)
    assert found[1] == found[0]
    if "pip" in found[0]:
        assert found[0].pop("pip")[1] == 42
    assert found[2] == found[0]


def has_headers(python):
    code = "import sysconfig; print(sysconfig.get_path('include'))"
    include = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    return Path(include, "Python.h").exists()


# ------------------------------------------------------------------------------- the images ---

WAIT = "import sys; print(sys.copyright.split()[-5], flush=True); sys.stdin.read()"


def waiting(command, images):
    return subprocess.Popen(
        [*RUN, *command, "-c", WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment(images),
    )  # fmt: skip


def written(images):
    """The interpreters' images in a store, without anchors for tools."""
    found = images.glob("*/*python*")
    return [path for path in found if not path.parent.name.endswith("anchor")]


@pytest.mark.images
def test_first_starts_at_the_same_time(kind, images):
    """All share what the fastest wrote."""
    processes = [waiting([kind], images) for _ in range(6)]
    try:
        for process in processes:
            assert process.stdout.readline()
        texts = check_primed([process.pid for process in processes])
        outside.require_one_copy(texts)
        assert len(written(images)) == len(outside.require_one_image(texts))
    finally:
        for process in processes:
            process.communicate()


def drop(path):
    """Have a file's pages out of memory, if nobody maps them."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_small(path):
    """Have them in memory as small ones."""
    drop(path)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, path.stat().st_size, outside.PAGE):
            os.pread(file.fileno(), 1, offset)


@pytest.mark.parametrize("read", [False, True], ids=["dropped", "read as small pages"])
@pytest.mark.images
def test_pages_that_are_no_longer_in_memory(kind, images, read):
    """As after a restart of the machine, or when somebody copied the store."""
    require_one_address(kind)
    run([kind, "-c", ""], images)
    (image,) = written(images)
    drop(image)
    if read:
        read_small(image)
    for _ in range(2):
        with waiting([kind], images) as process:
            process.stdout.readline()
            check_primed([process.pid])
            process.communicate()


def test_an_interpreter_that_was_replaced(images, tmp_path):
    """By one of the same size and build-id: the image is of what is there now."""
    if "static" not in KINDS:
        pytest.skip("no static interpreter here")
    original = Path(os.path.realpath(KINDS["static"]))
    program = tmp_path / original.name
    for word in (b"Centrum,", b"CENTRUM,", b"centrum,"):
        content = original.read_bytes().replace(b"Centrum,", word)
        assert word in content
        (tmp_path / "new").write_bytes(content)
        (tmp_path / "new").chmod(0o755)
        (tmp_path / "new").rename(program)
        for _ in range(2):
            with waiting([str(program)], images) as process:
                assert process.stdout.readline().encode() == word + b"\n"
                check_primed([process.pid])
                process.communicate()


# ------------------------------------------------------------------------- with integrations ---


def test_gunicorns_integration_says_it(kind, images, tmp_path):
    require_module(kind, "gunicorn")
    env = {"PAGE_PRIMER_IMAGE_DIR": str(images)}
    where = f"image in {images}" if has_images() else "memfd"
    with Gunicorn(kind, tmp_path, "-w", "2", env=env, wrapper=RUN) as server:
        server.wait_for_workers(2)
        (text, *_) = check_primed([server.master, *server.workers])
        ((pid, line),) = server.lines("INFO")
        assert pid == server.master
        share = "100 %" if text.huge == text.size else r"\d+\.\d %"
        assert re.match(rf"{share} of .* of code on huge pages \({where}[,)]", line)
        warnings = server.lines("WARNING")
        assert not warnings or not has_images()
        assert all(pid == server.master and trust.UNTRUSTED in text for pid, text in warnings)


# ---------------------------------------------------------------------------------- fallbacks ---


def test_no_directory_for_images(kind):
    """Then memory without a name is used; -v says it in one line."""
    code = "print(flush=True); input()"
    with subprocess.Popen(
        [LAUNCHER, "run", "-v", "--", kind, "-c", code], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # So that memory without a name takes all of the code.
        env=environment("/etc/passwd/images", PAGE_PRIMER_KEEP_PROFILERS="0"),
    ) as process:  # fmt: skip
        process.stdout.readline()
        check_primed([process.pid])
        _, said = process.communicate("\n")
    (line,) = said.splitlines()
    assert re.match(rf"page-primer\[{process.pid}\]: .* of code on huge pages \(memfd[,)]", line)


@pytest.mark.slow
@pytest.mark.parametrize("options", [["-I"], ["-E"], ["-W", "ignore", "-BE"], ["-X", "dev", "-S"]])
def test_an_interpreter_that_does_not_import_ours(base, images, options):
    """It runs as without page-primer, late libraries included."""
    code = (
        "import sys, zlib\n"
        "path = [p for p in sys.path if not p.endswith('/page_primer/launcher/site')]\n"
        "print(path, sorted(sys.modules), sys.flags);"
        "print(open('/proc/self/maps').read().count('page'))"
    )
    plain, others = both([base, *options, "-c", code], images)
    assert plain.returncode == 0, plain.stderr
    for other in others:
        assert (other.stdout, other.stderr) == (plain.stdout, plain.stderr)
    # The program's own options are not the interpreter's.
    tell = "print('page_primer' in __import__('sys').modules)"
    assert run([base, "-c", tell, *options], images).stdout == "True\n"


def test_an_old_interpreter(images):
    old = sorted(Path.home().glob(".pyenv/versions/3.[6-9].*/bin/python3"))
    if not old:
        pytest.skip("no CPython before 3.10 here")
    code = "import sys; print(sys.path, sorted(sys.modules))"
    plain, others = both([str(old[-1]), "-c", code], images)
    for other in others:
        assert (other.stdout, other.stderr) == (plain.stdout, "")


# Milliseconds each, with what they import in turn.
SLOW = {"collections", "contextlib", "dataclasses", "enum", "functools", "importlib", "inspect",
        "re", "signal", "subprocess", "threading", "typing", "warnings"}  # fmt: skip


def test_a_start_imports_nothing_slow(python, images):
    """Neither the launcher nor the process that it becomes, be there aligned files or not."""
    listed = images.parent / "aligned"
    listed.write_text("/nowhere/libaligned.so\n")
    said = "PYTHONPROFILEIMPORTTIME"

    def imported(*command, **env):
        done = run([*command, python, "-c", "pass"], env={said: "1", **env})
        assert done.returncode == 0, done.stderr
        return {line.split("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}

    # Not by the command, whose script is the installer's: re is imported there by some.
    start = "import sys; from page_primer.cli.main import main; sys.exit(main())"
    launcher = [sys.executable, "-c", start, "run", "--"]
    plain = imported()
    for file in (os.devnull, str(listed)):
        more = imported(*launcher, PAGE_PRIMER_IMAGE_DIR=str(images), PAGE_PRIMER_ALIGNED=file)
        assert {"page_primer.launcher.run", "page_primer.apply.process"} <= more
        assert not (more - plain) & SLOW


@pytest.mark.slow
def test_bad_settings(python):
    for options in (["--limit", "much"], ["--image-dir", "relative"], ["--backing", "paper"]):
        done = subprocess.run(
            [LAUNCHER, "run", *options, "--", python, "-c", ""], capture_output=True, text=True
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"page-primer: {options[0]} must be "), line
    for name in ("LATE", "VERBOSE"):
        done = run([*RUN, python, "-c", ""], env={f"PAGE_PRIMER_{name}": "perhaps"})
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert f"PAGE_PRIMER_{name}" in line, line
    done = subprocess.run([LAUNCHER, "run"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "page-primer: run: no command\n")
