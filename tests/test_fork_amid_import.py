"""A fork in the midst of another thread's call, which imports what it needs: the child has that
thread's import locks, which nobody releases."""

import textwrap

import pytest
from harness.process import Process

# A slow disk keeps the first call long.
CODE = """
    import os, sys, threading, time, page_primer
    options = dict(image_dir={images!r}, **{options!r})
    page_primer._loading.LONGEST_WAIT = {wait}
    begun, go_on = threading.Event(), threading.Event()

    def slowly(event, arguments):
        if event == "open" and {module!r} in str(arguments[0]).replace("__pycache__/", ""):
            begun.set()
            go_on.wait({slow})

    for name in ("fnmatch",):  # a .pth file may have it
        sys.modules.pop(name, None)
    sys.addaudithook(slowly)
    thread = threading.Thread(target=lambda: page_primer.prime(**options))
    thread.start()
    assert begun.wait(60)
    child = os.fork()
    if child == 0:
        reason = page_primer.prime(**options).reason
        again = os.fork()
        if again == 0:
            os._exit(0 if page_primer.prime(**options).reason == reason else 1)
        same = os.waitpid(again, 0)[1] == 0
        os._exit(0 if same and reason == {reason!r} else 3)
    deadline = time.monotonic() + 60
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    go_on.set()
    thread.join()
    result = [bool(ended), status, page_primer.prime(**options).reason]
"""


# A module of a first call's, and those that are imported later, where something needs them.
MODULES = {
    "page_primer/kernel/memory.": {},
    "page_primer/backing/image.": {},
    "page_primer/images/anchors.": {"backing": "memfd"},
    "page_primer/apply/perfmap.": {"perf_map": True},
    "page_primer/heap/driver.": {"heap": "arenas"},
    "page_primer/heap/freeze.": {"freeze": True},
    "/fnmatch.": {"exclude": "*/numpy/*"},
}


def told(python, images, **given):
    with Process(python) as process:
        return process.run(textwrap.dedent(CODE.format(images=str(images), **given)))


@pytest.mark.parametrize("module", MODULES)
def test_a_fork_waits_for_an_import(python, images, module):
    given = {"module": module, "options": MODULES[module]}
    assert told(python, images, wait=60, slow=0.1, reason=None, **given) == [True, 0, None]


def test_a_fork_waits_not_for_long(python, images):
    reason = "forked while another thread loaded page-primer"
    given = {"module": "page_primer/kernel/memory.", "options": {}}
    assert told(python, images, wait=0.05, slow=60, reason=reason, **given) == [True, 0, None]


# A handler that raises as an import's context begins to end, which then has no end: at the first of
# a call, at the second, and so on. Another thread takes the signal where this one blocks it.
CUT_SHORT = """
    import os, signal, sys, threading, time, page_primer
    options = dict(image_dir={images!r})
    page_primer._loading.LONGEST_WAIT = 0.05
    end = page_primer._loading.Loading.__exit__.__code__
    class Limit(Exception): pass
    def handler(*_): raise Limit
    signal.signal(signal.SIGUSR1, handler)
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    def watch(frame, event, argument):
        global left
        if event == "call" and frame.f_code is end:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGUSR1)
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    pass
    def fork():
        child = os.fork()
        if child == 0:
            reason = page_primer.prime(**options).reason
            os.write(writer, f"{{reason}}\\n".encode())
            os._exit(0)
        os.waitpid(child, 0)
    reader, writer = os.pipe()
    at, raised = 1, True
    while raised:
        left, raised = at, False
        sys.setprofile(watch)
        try:
            page_primer.prime(**options)
        except Limit:
            raised = True
        finally:
            sys.setprofile(None)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
        page_primer.restore()
        at += 1
    result = at, left, os.read(reader, 65536).decode().splitlines()
"""


def test_an_import_that_a_handler_cut_short_keeps_no_fork(python, images):
    with Process(python) as process:
        code = textwrap.dedent(CUT_SHORT.format(images=str(images)))
        calls, left, reasons = process.run(code)
    assert calls > 3 and left > 0
    assert reasons == ["None"] * (calls - 1)
