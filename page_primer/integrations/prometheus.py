"""Figures of primed processes for Prometheus, by prometheus_client.

    from page_primer.integrations import prometheus
    prometheus.export()

In its multiprocess mode (`PROMETHEUS_MULTIPROC_DIR`), call it before the workers are forked or in
each of them; in a gunicorn configuration file, beside it::

    child_exit = "page_primer.integrations.prometheus.child_exit"
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Gauge, multiprocess
from prometheus_client.core import GaugeMetricFamily

from page_primer import integrations
from page_primer.integrations import metrics


def export(registry: CollectorRegistry = REGISTRY) -> None:
    """Have the figures of this process (page_primer_code_bytes, page_primer_code_huge_bytes and so
    on) in a registry. Without the multiprocess mode they are read at each scrape; with it whenever
    a process is primed, and in update(), for another process serves them."""
    if is_multiprocess():
        gauges = _Gauges(registry)
        integrations.on_report.append(gauges.update)
        gauges.update()
    else:
        registry.register(_Collector())


def update() -> None:
    """In multiprocess mode: write the figures of this process anew."""
    for listener in integrations.on_report:
        listener()


def child_exit(server: Any, worker: Any) -> None:
    """gunicorn's hook: figures of a worker that has ended are no longer served."""
    if is_multiprocess():
        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


def is_multiprocess() -> bool:
    """Whether prometheus_client keeps values in files, for another process to serve."""
    return bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))


def _full_name(metric: metrics.Metric) -> str:
    name = f"page_primer_{metric.name}"
    return f"{name}_bytes" if metric.unit == "bytes" else name


class _Collector:
    """Reads at each scrape."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for metric in metrics.read():
            labels = None if metric.by_reason is None else ["reason"]
            family = GaugeMetricFamily(_full_name(metric), metric.description, labels=labels)
            if metric.by_reason is None:
                family.add_metric([], metric.value)
            for reason, value in (metric.by_reason or {}).items():
                family.add_metric([reason], value)
            yield family

    def describe(self) -> list[GaugeMetricFamily]:
        """None in advance, so that a registration reads nothing."""
        return []


class _Gauges:
    """Values in prometheus_client's files, one for each live process."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._reasons: set[str] = set()  # that have had a value
        self._gauges = {
            metric.name: Gauge(
                _full_name(metric), metric.description,
                () if metric.by_reason is None else ("reason",),
                registry=registry, multiprocess_mode="liveall",
            )
            for metric in metrics.read()
        }  # fmt: skip

    def update(self) -> None:
        for metric in metrics.read():
            gauge = self._gauges[metric.name]
            if metric.by_reason is None:
                gauge.set(metric.value)
            for reason in self._reasons - (metric.by_reason or {}).keys():
                if metric.by_reason is not None:
                    gauge.labels(reason).set(0)
            for reason, value in (metric.by_reason or {}).items():
                gauge.labels(reason).set(value)
                self._reasons.add(reason)
