"""What the host does in the midst of prime(): handlers that raise, forks, unloading."""

import ast
import builtins
import os
import signal
import textwrap
from pathlib import Path

import pytest
from harness.libraries import build_library
from harness.process import Process

import page_primer
from page_primer.kernel.smaps import read_smaps

INTERRUPT = """
    import os, signal, threading, time, page_primer
    class Limit(Exception): pass
    kinds = [Limit, KeyboardInterrupt, TimeoutError, MemoryError, ImportError]
    armed = False
    def handler(*_):
        if armed:
            raise kinds[raised % len(kinds)]
    signal.signal(signal.SIGALRM, handler)
    if {threaded}:  # to which the signal goes, whose handler then runs in the midst of a call
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    options = dict(backing={backing!r}, image_dir={images!r})
    def once():
        page_primer.prime(**options)
        page_primer.restore()
    def state():
        lines = open("/proc/self/status").read().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        spans = [line.split()[0].split("-") for line in open("/proc/self/maps")]
        size = sum(int(end, 16) - int(start, 16) for start, end in spans)
        locked, resident = (int(status[name].split()[0]) for name in ("VmLck", "VmRSS"))
        return [len(os.listdir("/proc/self/fd")), locked,
                len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), len(spans), size, resident << 10]
    for _ in range(20):
        once()
    took = 1.0
    for _ in range(3):  # one may be stalled by others
        began = time.time()
        once()
        took = min(took, time.time() - began)
    before, raised, reasons, kept = state(), 0, set(), []
    for _ in range(300):
        try:
            try:
                # Without the module random, which brings libcrypto and more to be primed.
                share = int.from_bytes(os.urandom(4), "big") / (1 << 32)
                after = 0.0002 + share * (took - 0.0002)
                armed = True
                signal.setitimer(signal.ITIMER_REAL, after)
                reasons.add(page_primer.prime(**options).reason)
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except tuple(kinds) as error:
            raised += 1
            kept.append(error)  # as what has failed a job is, with its frames
        page_primer.restore()
    result = raised, sorted(map(str, reasons)), before, state()
"""


@pytest.mark.slow
@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("backing", ["image", "memfd", "anonymous"])
def test_what_a_signal_handler_raises_reaches_its_host(python, images, backing, threaded):
    """And nothing stays behind: descriptors, locks, mappings, memory."""
    code = INTERRUPT.format(threaded=threaded, backing=backing, images=str(images))
    with Process(python) as process:
        count, reasons, before, after = process.run(textwrap.dedent(code))
    assert count > 30
    assert set(reasons) <= {"None"}, reasons
    assert after[:3] == before[:3]
    # Beside arenas of the interpreter's own, which hold hundreds of exceptions with their frames.
    assert after[3] <= before[3] + 4
    assert after[4] <= before[4] + (8 << 20)
    assert after[5] <= before[5] + (8 << 20)


# What a process holds, and whether it is more.
HELD = """
    import os
    def held():
        names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        files = sorted(os.readlink(name) for name in names if os.path.lexists(name))
        lines = open("/proc/self/maps").read().splitlines()
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
        return files, len(lines), sum(high - low for low, high in spans)
    def more(before, after):
        files, lines, size = after
        names = before[0], files
        assert names[0] == names[1], names
        return [lines - before[1] > 2, size - before[2] > 2 << 20]  # an arena, or so
    result = None
"""

# What prime() calls of the system, one call after another, is where the signal arrives: it goes to
# the process, and another thread takes it. That the calls are wrapped is the host's right, too.
# After those of the C core it arrives: what they made is in nobody's hands then.
AT_EACH_CALL = """
    import builtins, os, signal, threading, time, traceback, page_primer
    from page_primer import _core
    {handler}
    signal.signal(signal.SIGALRM, handler)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    options = dict(image_dir={images!r})
    page_primer.prime(**options)
    page_primer.restore()
    before = held()
    left, where, sent = -1, None, str({raised})
    def arrive():
        global left, where
        left -= 1
        if left == 0:
            where = "".join(traceback.format_stack(limit=4)[:2])
            os.kill(os.getpid(), signal.SIGALRM)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                pass
    def interrupted(function, late):
        def call(*args, **named):
            if not late:
                arrive()
            made = function(*args, **named)
            try:
                if late:
                    arrive()
                return made
            finally:
                made = None  # what this frame holds is not page_primer's to let go of
        return call
    calls = {{
        os: ["stat", "open", "readlink", "listdir", "scandir", "statvfs", "read"],
        builtins: ["open"],
        _core: ["threads", "thp_disabled", "advise", "lock", "unlock", "map", "protect", "unmap",
                "objects", "loads", "opened", "reserve", "swap"],
    }}
    for module, names in calls.items():
        for name in names:
            setattr(module, name, interrupted(getattr(module, name), module is _core))
    swallowed, caught, at = [], [], 1
    while True:
        left = at
        try:
            page_primer.prime(**options)
        except OSError as error:
            if str(error) != sent:
                raise
            caught.append(error)
        else:
            if left <= 0:
                swallowed.append(where)
        done, left = left > 0, -1
        page_primer.restore()
        if done:
            break
        at += 1 if at < 20 else {step}
    result = at, swallowed, more(before, held())
"""


FORGETS = "def handler(number, frame): del frame; raise"


@pytest.mark.parametrize(
    ("handler", "raised", "step"),
    [
        ("def handler(*_): raise", "TimeoutError('the limit')", 7),
        ("def handler(*_): raise", "PermissionError(13, 'no', 'x')", 7),
        (FORGETS, "OSError(62, 'the limit')", 23),
    ],
)
def test_a_handlers_error_is_no_answer_of_the_kernels(python, images, handler, raised, step):
    """TimeoutError is an OSError, for which reading takes a refusal; and a handler may delete the
    frame that it was given, by which it is known."""
    code = AT_EACH_CALL.format(
        images=str(images), raised=raised, handler=f"{handler} {raised}", step=step
    )
    with Process(python) as process:
        process.run(textwrap.dedent(HELD))
        calls, swallowed, left = process.run(textwrap.dedent(code))
    assert calls > 100, calls
    assert not swallowed, "".join(swallowed)
    assert not any(left)


AUDITED = """
    import os, sys, page_primer
    options = dict(image_dir={images!r}, backing={backing!r}, keep_profilers=False)
    page_primer.prime(**options)
    page_primer.restore()
    def open_files():
        paths = [f"/proc/self/fd/{{fd}}" for fd in os.listdir("/proc/self/fd")]
        return sorted(os.readlink(path) for path in paths if os.path.lexists(path))
    held = open_files()
    left, refused, outcomes = -1, 0, []
    def hook(event, arguments):
        global left, refused
        if left > 0:
            left -= 1
            if left == 0:
                refused += 1
                raise {raised}
    sys.addaudithook(hook)
    at = 1
    while True:
        left = at
        report = page_primer.prime(**options)
        done, left = left > 0, -1
        page_primer.restore()
        if done:
            break
        outcomes.append(report.reason)
        at += 1 if at < 12 else 2
    last = page_primer.prime(**options).reason
    page_primer.restore()
    result = refused, len(outcomes), last, held, open_files()
"""


@pytest.mark.parametrize("backing", ["image", "memfd"])
@pytest.mark.parametrize("raised", ["OSError('no')", "RuntimeError"])
def test_what_an_audit_hook_refuses_is_an_outcome(python, images, backing, raised):
    """It was asked by prime(), as the kernel is; it often has no errno to give."""
    code = AUDITED.format(images=str(images), backing=backing, raised=raised)
    with Process(python) as process:
        refused, outcomes, last, before, after = process.run(textwrap.dedent(code))
    assert refused == outcomes > 15
    assert (last, after) == (None, before)


PROGRAM_AMID = """
    import os, signal, threading, time, page_primer
    from page_primer import _core
    def mask():
        return [l.split()[1] for l in open("/proc/thread-self/status") if l.startswith("SigBlk")]
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    before = mask()
    amid = []
    def handler(*_):
        amid.append(mask())
        child = os.fork()
        if child == 0:
            os.dup2(os.open({file!r}, os.O_WRONLY | os.O_CREAT), 1)
            os.execvp("grep", ["grep", "SigBlk", "/proc/self/status"])  # a shell would unblock all
        os.waitpid(child, 0)
    signal.signal(signal.SIGALRM, handler)
    lock = _core.lock
    def locks(*args):
        if not amid:
            os.kill(os.getpid(), signal.SIGALRM)
            until = time.monotonic() + 30
            while time.monotonic() < until and not amid:
                pass
        return lock(*args)
    _core.lock = locks
    report = page_primer.prime(image_dir={images!r})
    result = report.reason, before, mask(), amid[0], open({file!r}).read().split()[1:]
"""


def test_a_program_that_a_handler_forks_amid_prime_has_the_hosts_signals(python, images, tmp_path):
    code = PROGRAM_AMID.format(images=str(images), file=str(tmp_path / "mask"))
    with Process(python) as process:
        reason, before, mask, amid, program = process.run(textwrap.dedent(code))
    assert (reason, mask) == (None, before)
    assert int(mask[0], 16) & 1 << signal.SIGUSR2 - 1
    assert amid != mask  # the thread's other signals wait until prime() has come to its end
    assert program == mask


def test_what_another_thread_raises_here_reaches_the_host(python, images):
    """As time limits of jobs do (RQ, stopit): such an exception has no frame of its sender's."""
    code = f"""
        import ctypes, os, threading, time, page_primer
        options = dict(image_dir={str(images)!r})
        page_primer.prime(**options)
        page_primer.restore()
        class JobTimeout(Exception): pass
        failed = []
        main, reasons, got = threading.get_ident(), set(), 0
        ready = threading.Event()
        def send():
            for number in range(30):
                ready.wait()
                ready.clear()
                time.sleep(number / 3000)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(main), ctypes.py_object(JobTimeout))
        threading.Thread(target=send, daemon=True).start()
        before = held()
        for _ in range(30):
            ready.set()
            end = time.monotonic() + 2  # Python drops what it raises in a finalizer
            try:
                while time.monotonic() < end:
                    reasons.add(page_primer.prime(**options).reason)
                    reasons.add(page_primer.restore().reason)
            except JobTimeout as error:
                got += 1
                failed.append(error)
        last = page_primer.prime(**options).reason
        page_primer.restore()
        result = got, sorted(map(str, reasons)), last, more(before, held())
    """
    with Process(python) as process:
        process.run(textwrap.dedent(HELD))
        got, reasons, last, left = process.run(textwrap.dedent(code))
    assert got
    assert not any(left)
    assert reasons in ([], ["None"])  # a slow machine may end no call
    assert last is None


def test_whose_it_is_asks_no_code_of_the_hosts(python, images):
    """What the host's frames hold may be equal to nothing, as arrays are."""
    code = f"""
        import os, page_primer
        class Array:
            def __eq__(self, other): raise ValueError("the truth value of an array is ambiguous")
        real, refused = os.open, []
        def wrapped(path, *arguments, **named):
            pair = Array(), Array()
            if any(part in str(path) for part in ("sys/kernel", "page-primer", {str(images)!r})):
                refused.append(path)
                raise PermissionError(13, "not here", path)
            return real(path, *arguments, **named)
        os.open = wrapped
        result = page_primer.prime(image_dir={str(images)!r}).reason, len(refused) > 0
    """
    with Process(python) as process:
        assert process.run(textwrap.dedent(code)) == [None, True]


ROOMS = ["apply", "backing", "elf", "heap", "images", "kernel", "survey.py", "align/aligned.py",
         "__init__.py", "health.py"]  # fmt: skip


def test_exceptions_in_a_circle_are_the_hosts(python, images):
    """Whoever sets __context__ may make one, and gets it back as it was."""
    code = f"""
        import os, signal, threading, time, page_primer
        from page_primer import _core
        class Limit(Exception): pass
        first, second = Limit("first"), Limit("second")
        first.__context__, second.__context__ = second, first
        def handler(*_): raise first
        signal.signal(signal.SIGALRM, handler)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        lock = _core.lock
        def interrupted(*args):
            os.kill(os.getpid(), signal.SIGALRM)
            until = time.monotonic() + 30
            while time.monotonic() < until:
                pass
            return lock(*args)
        _core.lock = interrupted
        try:
            result = str(page_primer.prime(image_dir={str(images)!r}))
        except BaseException as error:
            result = repr(error)
    """
    with Process(python) as process:
        assert process.run(textwrap.dedent(code)) == "Limit('first')"


def files_of(rooms):
    package = Path(page_primer.__file__).parent
    files = [f for room in rooms for f in ([package / room] if room.endswith(".py") else
             sorted((package / room).glob("*.py")))]  # fmt: skip
    assert len(files) > 30
    return files


def test_who_catches_asks_whose_it_is():
    """In what prime() executes: `except ours(OSError)`, or is_ours() in the handler."""
    files = files_of(ROOMS)
    missing = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
                inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                raises = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
                known = {n for n in names if hasattr(builtins, n)} - {"BaseException"}
                if known and not raises and not inside & {"ours", "is_ours"}:
                    missing.append(f"{file}:{node.lineno}")
    assert not missing, missing


def test_what_a_call_opens_is_owned():
    """By an object, with which it is closed, whatever exception comes."""
    package = Path(page_primer.__file__).parent
    plain = {"open", "dup", "close", "fdopen", "memfd"}
    found = []
    for file in files_of(ROOMS):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = ast.unparse(node.func)
                if name in {f"{module}.{each}" for module in ("os", "_core") for each in plain}:
                    found.append(f"{file.relative_to(package)}:{node.lineno}: {name}")
    assert [each for each in found if not each.startswith("align/")] == []


def test_a_fork_amid_another_threads_call_is_not_disturbed_by_a_handler(python, images):
    code = f"""
        import os, random, signal, sys, threading, page_primer
        options = dict(image_dir={str(images)!r})
        page_primer.prime(**options); page_primer.restore()
        class Timeout(Exception): pass
        def handler(*_): raise Timeout
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = lambda _: None
        stop = False
        def loop():
            while not stop:
                page_primer.prime(**options)
                page_primer.restore()
        thread = threading.Thread(target=loop)
        thread.start()
        ended, parent = [], os.getpid()
        for _ in range(500):
            read, write = os.pipe()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0003, 0.004))
                child = os.fork()
                signal.setitimer(signal.ITIMER_REAL, 0)
                if child == 0:
                    page_primer.prime(**options)
                    os.write(write, (page_primer.prime(**options).reason or "fine").encode())
                    os._exit(0)
            except Timeout:
                if os.getpid() != parent:
                    os._exit(99)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            os.close(write)
            told = os.read(read, 999).decode()
            os.close(read)
            # The handler may have come before there was a child, or before its number was known.
            try:
                status = os.waitstatus_to_exitcode(os.waitpid(-1, 0)[1])
            except ChildProcessError:
                assert not told, told
                continue
            ended.append([told, status])
            if len(ended) == 20:
                break
        stop = True
        thread.join()
        result = ended
    """
    with Process(python) as process:
        ended = process.run(textwrap.dedent(code))
    assert len(ended) == 20
    # Of a child that the handler ended nothing is heard.
    assert [one for one in ended if one not in (["fine", 0], ["", 99])] == []
    assert ended.count(["fine", 0]) > 15


def test_threads_that_prime_without_pause_do_not_starve_a_fork(python, images):
    code = f"""
        import os, threading, page_primer
        options = dict(image_dir={str(images)!r})
        page_primer.prime(**options)
        stop, forking, before_it, calls = False, 0, {{}}, 0
        def waits():
            global forking
            forking += 1
        # The last to be registered is called first, before the fork waits for its turn.
        os.register_at_fork(before=waits)
        def loop(n):
            global calls
            while not stop:
                now = forking
                report = page_primer.prime(**options, limit=(64 + n) << 20)
                assert report.reason is None, report.reason
                calls += 1
                # Begun while a fork waited, and ended before it was made.
                if now and now == forking and now not in forked:
                    before_it[now] = before_it.get(now, 0) + 1
        forked = set()
        threads = [threading.Thread(target=loop, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            child = os.fork()
            forked.add(forking)
            if child == 0:
                os._exit(0)
            os.waitpid(child, 0)
        stop = True
        for thread in threads:
            thread.join()
        result = calls, list(before_it.values())
    """
    with Process(python) as process:
        calls, before_it = process.run(textwrap.dedent(code))
    # Until a fork waits in earnest, threads may have the GIL some times more; of calls that did not
    # stand back there would be hundreds in the ten seconds until it is made all the same.
    assert calls > 0
    assert sum(before_it) < 50, (calls, before_it)


def test_what_was_unloaded_is_forgotten(python, images, tmp_path):
    library = build_library(tmp_path, "libbig.so")
    with Process(python) as process:
        process.prime(image_dir=str(images))
        process.restore()
        process.run(f"import ctypes; lib = ctypes.CDLL({str(library)!r}); result = None")
        before = len(os.listdir(f"/proc/{process.pid}/fd"))
        report = process.prime(image_dir=str(images))
        assert str(library) in report["moved"]
        mine = next(obj for obj in report["objects"] if obj["path"] == str(library))
        locked = [one["start"] for one in mine["segments"] if one["locked_bytes"]]
        process.run(
            "dl = ctypes.CDLL(None); dl.dlclose.argtypes = [ctypes.c_void_p]\n"
            "dl.dlclose(lib._handle)"
        )
        # The host uses the addresses meanwhile, and locks them.
        start = process.run(
            textwrap.dedent(
                f"""
                import mmap
                at = {min(locked)}
                dl.mmap.restype = ctypes.c_void_p
                dl.mmap.argtypes = [
                    ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long
                ]
                assert dl.mmap(at, mmap.PAGESIZE, 3, 0x22, -1, 0) == at
                dl.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
                assert dl.mlock(at, mmap.PAGESIZE) == 0
                result = at
                """
            )
        )
        report = process.restore()
        assert str(library) not in [obj["path"] for obj in report["objects"]]
        assert len(os.listdir(f"/proc/{process.pid}/fd")) == before
        (mapping,) = [m for m in read_smaps(process.pid) if m.start == start]
        assert mapping.is_locked
