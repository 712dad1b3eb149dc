"""Figures of primed processes for OpenTelemetry: observable gauges, read at each collection.

    from page_primer.integrations import opentelemetry
    opentelemetry.export()

Call it in each process that has a meter provider of its own, after forks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from opentelemetry import metrics as api
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from page_primer.integrations import metrics

_UNITS = {"bytes": "By", "faults": "{fault}"}  # UCUM, which OpenTelemetry asks for
_FRESH = 0.5  # seconds


def export(meter: Meter | None = None) -> None:
    """Have the figures of this process (page_primer.code, page_primer.code_huge and others)
    observed.

    Args:
        meter: where the gauges are made; by default one of the global meter provider.
    """
    meter = meter or api.get_meter("page_primer")
    readings = _Readings()
    for metric in readings.latest():
        meter.create_observable_gauge(
            f"page_primer.{metric.name}", [_Callback(readings, metric.name)],
            unit=_UNITS[metric.unit], description=metric.description,
        )  # fmt: skip


class _Readings:
    """Each collection asks for every gauge in turn: one reading serves them all."""

    def __init__(self) -> None:
        self._read = 0.0
        self._metrics: tuple[metrics.Metric, ...] = ()

    def latest(self) -> tuple[metrics.Metric, ...]:
        now = time.monotonic()
        if not self._metrics or now - self._read > _FRESH:
            self._read, self._metrics = now, metrics.read()
        return self._metrics


class _Callback:
    """What one gauge shows."""

    def __init__(self, readings: _Readings, name: str) -> None:
        self._readings, self._name = readings, name

    def __call__(self, _: CallbackOptions) -> Iterable[Observation]:
        metric = next(m for m in self._readings.latest() if m.name == self._name)
        if metric.by_reason is None:
            yield Observation(metric.value)
        for reason, value in (metric.by_reason or {}).items():
            yield Observation(value, {"reason": reason})
