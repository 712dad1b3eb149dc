"""Figures for Prometheus and OpenTelemetry: a real gunicorn in multiprocess mode, real readers."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import urllib.request

from harness import outside
from harness.gunicorn_server import Gunicorn
from harness.privileges import has_images
from harness.process import Process
from harness.servers import wait_for

SIZES = ("code", "code_huge", "locked", "copied", "heap", "heap_huge")

METRICS_APP = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
def app(environ, start_response):
    body = str(os.getpid()).encode()
    if environ["PATH_INFO"] == "/metrics":
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        body = generate_latest(registry)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [body]
"""

CONF = """
from page_primer.integrations import prometheus
child_exit = "page_primer.integrations.prometheus.child_exit"
prometheus.export()
"""


def of_processes(text, name):
    """A gauge's value of each process."""
    found = re.findall(rf'^page_primer_{name}{{pid="(\d+)"}} (\S+)$', text, re.MULTILINE)
    return {int(pid): float(value) for pid, value in found}


def agrees(pid, code, huge, locked):
    """Figures of a process with what smaps says of it now: locks exactly; code to a few bytes that
    lie between sections, fewer than a page for each object."""
    seen = outside.totals_of(pid)
    message = f"{pid}: {seen}, exported: {code} code, {huge} huge, {locked} locked"
    assert locked == seen.locked > 1 << 20, message
    assert abs(code - seen.code) < seen.objects * outside.PAGE, message
    assert abs(huge - seen.huge) < seen.objects * outside.PAGE, message
    assert huge > 1 << 20, message


def test_prometheus_has_each_live_worker_as_smaps_has_it(python, images, tmp_path):
    (tmp_path / "gunicorn.conf.py").write_text(CONF)
    (tmp_path / "figures").mkdir()
    env = {
        "PAGE_PRIMER_IMAGE_DIR": str(images),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "figures"),
    }
    with Gunicorn(python, tmp_path, "--workers", "4", env=env, app=METRICS_APP) as server:

        def scrape():
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
                return answer.read().decode()

        def has_all():
            huge = of_processes(scrape(), "code_huge_bytes")
            return huge.keys() == {server.master, *server.workers} and min(huge.values()) > 0

        server.wait_for_workers(4)
        wait_for(has_all, "figures of the master and four workers")
        text = scrape()
        names = ("code_bytes", "code_huge_bytes", "locked_bytes")
        code, huge, locked = (of_processes(text, name) for name in names)
        for pid in (server.master, *server.workers):
            agrees(pid, code[pid], huge[pid], locked[pid])
        assert "page_primer_code_left_bytes{" in scrape()

        # One that ends is no longer there: child_exit.
        ended, *_ = server.workers
        os.kill(ended, signal.SIGTERM)
        wait_for(lambda: ended not in server.workers, "the worker's end")
        wait_for(has_all, "figures of the new worker, and none of the one that ended")


def test_prometheus_reads_at_each_scrape(python, images):
    with Process(python) as process:
        before, after = process.run(
            textwrap.dedent(f"""
            import page_primer
            from prometheus_client import CollectorRegistry, generate_latest
            from page_primer.integrations import prometheus
            registry = CollectorRegistry()
            prometheus.export(registry)
            before = generate_latest(registry).decode()
            page_primer.prime(image_dir={str(images)!r})
            result = before, generate_latest(registry).decode()
            """)
        )
    values = [
        {name: float(re.search(rf"^page_primer_{name}_bytes (\S+)$", text, re.M)[1])
         for name in SIZES}
        for text in (before, after)
    ]  # fmt: skip
    assert values[0]["code_huge"] == values[0]["copied"] == 0
    assert values[1]["code_huge"] > 1 << 20
    assert values[1]["locked"] > values[0]["locked"]
    assert "page_primer_code_left_bytes{" not in before
    assert 'page_primer_code_left_bytes{reason="' in after
    assert re.search(r"^page_primer_minor_faults \d", after, re.M)


def test_opentelemetry_observes_at_each_collection(python, images):
    with Process(python) as process:
        before, after = process.run(
            textwrap.dedent(f"""
            import time
            import page_primer
            from opentelemetry.sdk.metrics import MeterProvider
            from opentelemetry.sdk.metrics.export import InMemoryMetricReader
            from page_primer.integrations import opentelemetry as exported
            reader = InMemoryMetricReader()
            exported.export(MeterProvider([reader]).get_meter("page_primer"))
            def read():
                found = {{}}
                (resource,) = reader.get_metrics_data().resource_metrics
                for metric in resource.scope_metrics[0].metrics:
                    found[metric.name] = metric.unit, [
                        (point.value, dict(point.attributes)) for point in metric.data.data_points]
                return found
            before = read()
            page_primer.prime(image_dir={str(images)!r})
            time.sleep(0.6)
            result = before, read()
            """)
        )
    assert before["page_primer.code_huge"] == ["By", [[0, {}]]]
    ((huge, _),) = after["page_primer.code_huge"][1]
    assert huge > (1 << 20 if has_images() else 0)
    assert all(reason for _, reason in after["page_primer.code_left"][1])
    assert set(before) <= set(after) >= {f"page_primer.{name}" for name in SIZES}


def test_modules_say_what_they_need(tmp_path):
    """Without the extra, an ImportError that names the package."""
    packages = {"prometheus": "prometheus_client", "opentelemetry": "opentelemetry"}
    for module, package in packages.items():
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None\n"
             f"import page_primer.integrations.{module}"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 1
        assert package in done.stderr.splitlines()[-1]
