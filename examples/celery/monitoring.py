"""Figures of the worker's processes for Prometheus, on the port METRICS_PORT (9100)."""

import os
from typing import Any

from celery.signals import worker_process_shutdown, worker_ready
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from page_primer.integrations import prometheus

prometheus.export()


@worker_ready.connect
def serve(**_: Any) -> None:
    """In the worker's parent, after its pool was forked."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    start_http_server(int(os.environ.get("METRICS_PORT", "9100")), registry=registry)


@worker_process_shutdown.connect
def forget(pid: int, **_: Any) -> None:
    """In a child that ends."""
    mark_process_dead(pid)
