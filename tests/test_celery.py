"""A real Celery worker with a real Redis; every process that runs tasks is looked at in smaps."""

import os
import re
import subprocess
import sys

import pytest
from harness import outside
from harness.celery_worker import BY_IMPORT, TASKS, Worker, spread
from harness.privileges import locks_fit
from harness.servers import check, wait_for

pytest.importorskip("celery", reason="Celery is not installed")


@pytest.mark.parametrize(
    "configure",
    [
        pytest.param(BY_IMPORT, id="imports"),
        pytest.param(
            "import page_primer.integrations.celery as primer; primer.setup(app)",
            marks=pytest.mark.slow,
            id="setup",
        ),
    ],
)
def test_prefork(tmp_path, broker, images, configure):
    with Worker(tmp_path, broker, images, "-c", "3", configure=configure) as worker:
        assert set(worker.call(spread(6))) <= set(worker.pool)
        assert len(worker.pool) == 3
        texts = check([worker.pid, *worker.pool])
        outside.require_one_copy(texts)
        (line,) = [line for line in worker.lines("INFO") if "of code on huge pages" in line]
        assert "locked" in line
        assert len(worker.lines("DEBUG")) >= 3


@pytest.mark.slow
def test_children_near_their_memory_limit_are_warned_of_once(tmp_path, broker, images):
    """Celery would replace a child after each task, and say nothing of why."""
    limit = "app.conf.worker_max_memory_per_child = 20000\n"
    with Worker(tmp_path, broker, images, "-c", "2", configure=BY_IMPORT + limit) as worker:
        (line,) = [line for line in worker.lines("WARNING") if "max_memory_per_child" in line]
        assert "it is replaced after each task; set worker_max_memory_per_child to " in line
        size = int(re.search(r"a child takes (\d+) KiB", line)[1])
        assert size > 20000
        assert int(line.split(" set worker_max_memory_per_child to ")[1].split()[0]) >= 2 * size


def test_a_memory_limit_that_is_far_is_nothing_to_be_said():
    from page_primer.integrations.celery import memory_warning

    assert memory_warning(50_000, 39_999) is None
    assert "after few tasks" in memory_warning(50_000, 40_000)
    assert "after each task" in memory_warning(50_000, 50_001)


@pytest.mark.parametrize(
    ("pool", "options", "size"),
    [
        ("prefork", {"concurrency": 3}, 3),
        ("prefork", {"concurrency": "3"}, 3),
        ("prefork", {}, 5),
        ("processes", {}, 5),
        ("celery.concurrency.prefork:TaskPool", {}, 5),
        ("solo", {"pool_cls": "prefork"}, 5),
        ("prefork", {"pool": "threads"}, 0),
        ("threads", {"concurrency": 3}, 0),
        ("celery.concurrency.solo:TaskPool", {}, 0),
        ("prefork", {"autoscale": (100, 2)}, 100),
        ("prefork", {"autoscale": "100,2", "concurrency": 4}, 100),
        ("prefork", {"autoscale": "100"}, 100),
        ("prefork", {"concurrency": "four"}, 0),  # which Celery refuses
        ("prefork", {"autoscale": "four,"}, 0),
    ],
)
def test_how_many_children_a_pool_will_have(pool, options, size):
    from celery import Celery
    from celery.concurrency import get_implementation

    from page_primer.integrations.celery import _pool_size

    conf = Celery().conf
    conf.update(worker_pool=pool, worker_concurrency=5)
    assert _pool_size(conf, options) == size
    # The command line gives a class.
    if "pool" not in options:
        given = {**options, "pool_cls": get_implementation(options.get("pool_cls", pool))}
        assert _pool_size(conf, given) == size


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [("-P", "solo"), ("-P", "threads", "-c", "3"), ("--autoscale", "3,1")],
    ids=["solo", "threads", "autoscale"],
)  # fmt: skip
def test_pools(tmp_path, broker, images, options):
    with Worker(tmp_path, broker, images, *options) as worker:
        ran = worker.call(spread(4))
        alive = [pid for pid in ran if os.path.exists(f"/proc/{pid}")]
        assert alive
        check({worker.pid, *alive})


@pytest.mark.slow
def test_gevent(tmp_path, broker, images):
    pytest.importorskip("gevent", reason="gevent is not installed")
    with Worker(tmp_path, broker, images, "-P", "gevent", "-c", "3") as worker:
        assert worker.call(spread(4)) == [worker.pid]
        check([worker.pid])


@pytest.mark.slow
def test_beat_in_the_worker(tmp_path, broker, images):
    with Worker(tmp_path, broker, images, "-c", "2", "-B") as worker:
        ran = worker.call(spread(4))
        check([worker.pid, *ran])


@pytest.mark.slow
def test_spawned_children(tmp_path, broker, images):
    """Fresh interpreters: each primes for itself, and maps the image that is there."""
    configure = BY_IMPORT + "app.conf.worker_pool_start_method = 'spawn'\n"
    with Worker(tmp_path, broker, images, "-c", "2", configure=configure) as worker:
        ran = worker.call(spread(4))
        texts = check([worker.pid, *ran])
        outside.require_one_image(texts)


# In each child, before anything is loaded there.
LOOK = """
def look():
    from page_primer import _core
    from page_primer.apply.process import process
    os.write(2, b"its parent knows all: %d\\n" % (process.loads == _core.loads()))
os.register_at_fork(after_in_child=look)
"""
# Celery has all garbage collected twice before each fork, half of what a child costs: of what is
# frozen the collector looks at nothing.
FROZEN = """
import gc
from celery.signals import worker_ready
worker_ready.connect(lambda **_: gc.freeze(), weak=False)
"""


@pytest.mark.slow
def test_a_thousand_tasks_of_one_child_each(tmp_path, broker, images):
    options = ["-c", "4", "--max-tasks-per-child", "1"]
    # A minute for a child until it is up, not four seconds: this machine may be busy.
    configure = BY_IMPORT + "app.conf.worker_proc_alive_timeout = 60\n" + LOOK + FROZEN
    env = {"PAGE_PRIMER_MLOCK": "1"}
    with Worker(tmp_path, broker, images, *options, configure=configure, env=env) as worker:
        source = "sum(r.get(timeout=600) for r in [work.add.delay(i, 1) for i in range(1000)])"
        assert worker.call(source, timeout=3600) == sum(range(1000)) + 1000
        # The four that got no task: one is forked when the one before it has ended, and all others
        # have when these are primed.
        wait_for(lambda: worker.log().count("as before") == 1004, "a pool to look at")
        assert len(worker.pool) == 4
        check(worker.pool)
        log = worker.log()
        assert "Timed out waiting for UP message" not in log
        assert "WorkerLostError" not in log
        assert "SIGKILL" not in log
        # None had to look at everything again, for a library that its parent has loaded.
        assert "its parent knows all: 0" not in log
        assert log.count("its parent knows all: 1") >= 1000
        # Each child said that it was locked as its parent, and nothing above DEBUG.
        assert len([line for line in worker.lines("DEBUG") if "as before" in line]) >= 1000
        assert len([line for line in worker.lines("INFO") if "huge pages" in line]) == 1


@pytest.mark.slow
def test_late_libraries_of_a_task(tmp_path, broker, images):
    for module in ("numpy", "pandas", "pyarrow"):
        pytest.importorskip(module, reason=f"{module} is not installed")
    configure = BY_IMPORT + "app.conf.page_primer = {'limit': '160M'}\n"
    with Worker(tmp_path, broker, images, "-c", "1", configure=configure) as worker:
        total, pid = worker.call("work.late.delay().get(timeout=120)")
        assert total == sum(range(1000))
        large = {
            v.path for v in outside.smaps(pid)
            if re.search(r"libarrow\.so|openblas", v.path) and "w" in v.perms
        }  # fmt: skip
        assert len(large) >= 2
        # Locked last, where that is allowed. (There is no line where the page cache has them on
        # huge pages already.)
        if locks_fit():
            wait_for(
                lambda: all(outside.text_of(pid, path).locked for path in large), "their locks"
            )
        texts = [outside.text_of(pid, path) for path in large]
        assert any(text.huge > 0 for text in texts), texts
        for text in texts:
            text.require_hot_chunks_huge()


@pytest.mark.slow
def test_the_limit_names_what_it_left_out(tmp_path, broker, images):
    pytest.importorskip("numpy", reason="numpy is not installed")
    pytest.importorskip("pandas", reason="pandas is not installed")
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    configure = BY_IMPORT + "app.conf.page_primer_limit = '8M'\n"
    with Worker(tmp_path, broker, images, "-c", "1", configure=configure) as worker:
        worker.call("work.late.delay().get(timeout=120)")
        wait_for(
            lambda: any("over the limit" in line and "arrow" in line
                        for line in worker.lines("DEBUG") + worker.lines("INFO")),
            "the report of what was left out",
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configure", "said"),
    [
        ("app.conf.page_primer = {'bakcing': 'auto'}", "unknown page-primer option 'bakcing'"),
        ("app.conf.page_primer = {'limit': 'lots'}", "limit must be a number of bytes"),
        ("app.conf.page_primer_backing = 'tape'", "backing must be one of"),
        ("app.conf.page_primer = 7", "page_primer must be True, False or a dict of options"),
    ],
)
def test_a_bad_option_stops_the_worker_with_one_line(tmp_path, broker, images, configure, said):
    worker = Worker(tmp_path, broker, images, configure=BY_IMPORT + configure)
    try:
        assert worker.process.wait(60) != 0
        (line,) = [line for line in worker.log().splitlines() if "page-primer: " in line]
        assert said in line
        assert "Traceback" not in worker.log()
    finally:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.output.close()


@pytest.mark.slow
def test_switched_off(tmp_path, broker, images):
    configure = BY_IMPORT + "app.conf.page_primer = False\n"
    with Worker(tmp_path, broker, images, "-c", "1", configure=configure) as worker:
        assert outside.text_of(worker.pid).huge == 0
        assert worker.lines("INFO") == ["nothing done: switched off"]


@pytest.mark.slow
def test_namespace(tmp_path, broker, images):
    configure = (
        "app.config_from_object({'CELERY_IMPORTS': ['page_primer.integrations.celery'], "
        "'CELERY_PAGE_PRIMER': {'backing': 'memfd', 'keep_profilers': False}, "
        "'CELERY_BROKER_URL': os.environ['BROKER'], 'CELERY_RESULT_BACKEND': os.environ['BROKER']"
        "}, namespace='CELERY')\n"
    )
    with Worker(tmp_path, broker, images, "-c", "1", configure=configure) as worker:
        check([worker.pid, *worker.pool])
        (line,) = [line for line in worker.lines("INFO") if "of code on huge pages" in line]
        assert "(memfd, " in line


def test_a_client_is_never_primed(tmp_path, broker, images):
    source = (
        "import work, page_primer.integrations.celery, sys; work.app.conf; "
        "print('page_primer.apply.process' in sys.modules)"
    )
    (tmp_path / "work.py").write_text(TASKS)
    env = {**os.environ, "BROKER": broker, "CONFIGURE": BY_IMPORT}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr
