"""Forks in which other libraries run Python, by pthread_atfork() (as grpc does), and forks while
other threads look at what is loaded."""

import subprocess

import pytest

# As a C library would, of Python functions. Registered before page_primer._core is loaded, its
# first handler runs after ours, and its others before ours.
REGISTER = """
import ctypes, gc, os, sys, threading, time

libc = ctypes.CDLL(None, use_errno=True)
kept = []
def register(*handlers):
    functions = [ctypes.CFUNCTYPE(None)(h) if callable(h) and not isinstance(h, ctypes._CFuncPtr)
                 else h for h in handlers]
    kept.extend(functions)
    assert libc.__register_atfork(*functions, None) == 0

def fill():
    return [bytes(200) for _ in range(30_000)]  # seven arenas

def counts():
    from page_primer import _core
    return dict(zip(("regions", "given", "spare"), _core.arenas_counts()))

def ends_with(child):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "it hung"
"""

HEAP = {"heap": "arenas", "remap": False, "mlock": False, "include": ["nothing"]}


def run(python, source):
    """A program that must end: at a hang it is killed with its children."""
    done = subprocess.run(
        ["timeout", "--kill-after=5", "60", python, "-X", "faulthandler", "-c", REGISTER + source],
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_a_handler_that_makes_and_frees_arenas(every_python):
    makes_and_frees(every_python, before=True)


def test_a_later_handler_that_makes_and_frees_arenas(python):
    makes_and_frees(python, before=False)


def makes_and_frees(python, *, before):
    """In the fork it frees what it had before, and makes what is kept; after it, all are ours."""
    run(
        python,
        f"""
old, new = [], []
def prepare():
    old.clear()
    new.append(fill())
def after():
    new.append(fill())
    new.pop(0)
if {before}:
    register(prepare, after, after)
import page_primer
report = page_primer.prime(**{HEAP})
if {not before}:
    register(prepare, after, after)
for _ in range(2):
    old[:] = [fill()]
    child = os.fork()
    if child == 0:
        inside = counts()
        new.clear()
        gc.collect()
        again = [fill() for _ in range(3)]
        grown = counts()["given"] - inside["given"]
        os._exit(0 if grown > 0 else 3)
    assert ends_with(child) == 0
    new.clear()
full = counts()
more = [fill() for _ in range(3)]
assert counts()["given"] > full["given"], (full, counts())
del more, full
gc.collect()
left = counts()
assert left["given"] <= 8 << 20, left
assert left["spare"] <= 4 << 20, left
page_primer.restore()
left = counts()
assert left["spare"] == 0, left
""",
    )


def test_a_handler_that_primes(python, images):
    """An import in such a handler may be of a library that is then to be moved."""
    run(
        python,
        f"""
reports = []
def prime():
    import page_primer
    import _decimal
    reports.append(page_primer.prime(image_dir={str(images)!r}))
register(prime, prime, prime)
import page_primer
first = page_primer.prime(image_dir={str(images)!r})
child = os.fork()
if child == 0:
    os._exit(0 if len(reports) == 2 and reports[-1].pid == os.getpid() else 3)
assert ends_with(child) == 0
assert [r.pid for r in reports] == [os.getpid()] * 2
assert all(r.reason is None for r in reports), [r.reason for r in reports]
""",
    )


def test_a_fork_without_the_gil_whose_handler_asks_for_it(python):
    """A C library's thread forks, the handler waits for the GIL, and who has that makes arenas."""
    run(
        python,
        f"""
seen = []
def prepare():
    seen.append(1)
register(prepare, None, libc._exit)  # a child without Python, as of popen(3)
import page_primer
report = page_primer.prime(**{HEAP})
done = threading.Event()
def churn():
    while not done.is_set():
        fill()
threads = [threading.Thread(target=churn, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(30):
    child = libc.fork()
    assert child > 0
    os.waitpid(child, 0)
done.set()
for thread in threads:
    thread.join()
assert len(seen) == 30
""",
    )


# What takes the loader's lock beside prime(): an import under `page-primer run`, and status().
LOOKS = {"import": "_core.objects", "status": "_core.loads"}


@pytest.mark.parametrize("look", LOOKS)
def test_a_fork_while_another_thread_has_the_loaders_lock(python, look):
    """A child that inherits it can load nothing, and an import in it hangs."""
    run(
        python,
        f"""
from page_primer import _core
stop = False
def look():
    while not stop:
        {LOOKS[look]}()
threads = [threading.Thread(target=look) for _ in range(2)]
for thread in threads:
    thread.start()
results = []
for _ in range(100):
    child = os.fork()
    if child == 0:
        _core.loads()
        os._exit(0)
    results.append(ends_with(child))
    if results[-1]:
        break
stop = True
for thread in threads:
    thread.join()
assert results == [0] * 100, results[-1]
""",
    )
