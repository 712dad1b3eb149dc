"""A fork in the midst of another thread's first call, which imports what it needs: the child has
that thread's import locks, which nobody releases."""

import textwrap

import pytest
from harness.process import Process

# A slow disk keeps the first call long.
CODE = """
    import os, sys, threading, time, page_primer
    options = dict(image_dir={images!r})
    page_primer._LONGEST_WAIT = {wait}
    begun, go_on = threading.Event(), threading.Event()

    def slowly(event, arguments):
        if event == "open" and "page_primer/kernel" in str(arguments[0]):
            begun.set()
            go_on.wait({slow})

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


@pytest.mark.parametrize(
    ("wait", "slow", "reason"),
    [
        pytest.param(60, 0.1, None, id="it waits"),
        pytest.param(
            0.05, 60, "forked while another thread loaded page-primer", id="it waits no longer"
        ),
    ],
)
def test_the_child_never_waits_for_a_thread_that_it_does_not_have(
    python, images, wait, slow, reason
):
    code = CODE.format(images=str(images), wait=wait, slow=slow, reason=reason)
    with Process(python) as process:
        assert process.run(textwrap.dedent(code)) == [True, 0, None]
