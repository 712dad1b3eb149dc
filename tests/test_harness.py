"""The rules of this directory: what tests have in common is in `harness`."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import kernel_log
from harness.probes import PROBES, perf
from harness.scopes import LONG, scope_of

ROOT = Path(__file__).parents[1]
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO


def imported(path):
    """The modules that a file imports, as it names them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "."


@pytest.mark.slow
def test_nothing_imports_a_test():
    files = [
        path
        for folder in ("tests", "benchmarks", "tools", "examples")
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or (path.parent.name == "tools" and b"python" in shebang(path))
    ]
    assert len(files) > 50
    wrong = {
        str(path.relative_to(ROOT)): name
        for path in files
        for name in imported(path)
        if name.split(".")[0].startswith(("test_", "conftest"))
    }
    assert wrong == {}


def shebang(path):
    return path.read_bytes().partition(b"\n")[0] if path.is_file() else b""


def test_probes_have_names_of_their_own():
    names = [f"{probe.look.__module__}.{probe.look.__name__}" for probe in PROBES.values()]
    assert len(set(names)) == len(names) > 20
    assert not any(name.endswith("._") for name in names)


@pytest.mark.slow
def test_benchmarks_and_tools_find_the_harness():
    for script in ("benchmarks/pressure.py", "tools/matrix.py", "tools/align_check"):
        env = {**os.environ, "PYTHONPATH": ""}
        command = [sys.executable, str(ROOT / script), "--help"]
        done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


KERNELS_OWN = [
    "BUG: Bad page state in process python3.11  pfn:1234",
    "WARNING: CPU: 0 PID: 91 at mm/memory.c:2000 insert_pfn+0x1",
    "Oops: 0000 [#1] PREEMPT SMP NOPTI",
    "kernel BUG at mm/huge_memory.c:2100!",
]
CRASHED = [
    "python3[{}]: segfault at 9f3dd8 ip 00007f60eab9317b sp 00007ffda9788660 error 4 in ld.so",
    "traps: gunicorn[{}] trap invalid opcode ip:7f3 sp:7ff error:0 in libpython3.11.so.1.0",
    "traps: my app[{}] general protection fault ip:7f3 sp:7ff error:0",
]


def test_faults_in_the_kernels_log_are_told_from_the_rest():
    rest = [
        "Memory cgroup out of memory: Killed process 77 (python3)",
        "audit: WARNING: no",
        *(line.format(1 << 23) for line in CRASHED),
    ]
    assert kernel_log.faults([*rest, *KERNELS_OWN]) == KERNELS_OWN
    watched = [line.format(7) for line in CRASHED]
    assert kernel_log.faults([*watched, *rest], {7}) == watched


def test_a_crash_is_in_the_kernels_log():
    try:
        log = kernel_log.KernelLog()
    except OSError as error:
        pytest.skip(f"the kernel's log is not readable here: {error.strerror}")
    if Path("/proc/sys/debug/exception-trace").read_text().strip() == "0":
        pytest.skip("the kernel does not log crashes here (debug.exception-trace)")
    if os.readlink("/proc/self/ns/pid") != FIRST_PID_NAMESPACE:
        pytest.skip("the kernel's log has other process numbers than this PID namespace")
    crash = "import ctypes, resource; resource.setrlimit(4, (0, 0)); ctypes.string_at(8)"
    for _ in range(20):  # printk_ratelimit: no more than ten in five seconds, others' included
        process = subprocess.Popen([sys.executable, "-c", crash])
        assert process.wait() == -signal.SIGSEGV
        if lines := kernel_log.faults(log.new(), {process.pid}):
            break
        time.sleep(1)
    (line,) = lines
    assert f"[{process.pid}]" in line and "segfault" in line


def test_the_rooms_of_architecture_md_are_the_contract():
    """In its order, in which each imports what stands below it."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.MULTILINE)
    told = [name.strip("`/") for row in rows for name in row.split(", ")]
    settings = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[(.*?)^\]", settings, flags=re.MULTILINE | re.DOTALL)
    held = [name for line in re.findall(r'"(.*)"', layers[1]) for name in line.split(" : ")]
    assert told == [*held, "_core"]


def test_what_takes_long_is_there():
    """A test that is renamed, or moved, would begin last again, and nobody would see it."""
    for scope in LONG:
        path, _, function = scope.partition("::")
        text = (ROOT / path).read_text()
        assert not function or f"def {function}(" in text, scope
        assert scope_of(f"{scope}[3.11-a::b]" if function else f"{scope}::test_it") == scope
    assert scope_of("tests/test_heap.py::test_it[1]") == "tests/test_heap.py"


def test_perf_is_judged_by_what_it_can_know():
    """Of several files at one path it knows the symbols of one; a memfd has no path."""
    line = "{}/1 1.0: PERF_RECORD_MMAP2 {}/1: [0x7f00(0x1000) @ 0 {} {} 0]: r-xp {}"
    libc, memfd = "/usr/lib/libc.so.6", "/memfd:page-primer (deleted)"
    mapped = [
        (1, "fe:00", 11, libc), (2, "00:2d", 11, libc), (1, "fe:00", 12, "/usr/bin/python3"),
        (2, "fe:00", 12, "/usr/bin/python3"), (1, "00:01", 13, memfd), (1, "00:01", 14, memfd),
    ]  # fmt: skip
    script = "\n".join(line.format(pid, pid, at, ino, path) for pid, at, ino, path in mapped)
    assert perf.of_several_files(script) == {libc}


@pytest.mark.parametrize(
    ("kind", "why"), [("debug", "Py_DEBUG"), ("free-threaded", "ThreadSanitizer at /nowhere")]
)
def test_a_sanitizer_that_is_not_here_is_not_clean(tmp_path, kind, why):
    command = [sys.executable, ROOT / "tools/sanitize", "--python-thread", "/nowhere", kind]
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done
    assert re.fullmatch(rf"{kind}: NOT RUN, .*{why}.*\nNOT RUN: {kind}\n", done.stdout), done
