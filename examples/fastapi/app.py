"""Converts temperatures."""

import os
from typing import Any

import fastapi
from pydantic import BaseModel

import page_primer

app = fastapi.FastAPI()


class Temperature(BaseModel):
    celsius: float
    fahrenheit: float


@app.get("/celsius/{degrees}")
async def celsius(degrees: float) -> Temperature:
    return Temperature(celsius=degrees, fahrenheit=degrees * 1.8 + 32)


@app.get("/health")
async def health() -> dict[str, Any]:
    """How the worker that answers is primed."""
    return page_primer.status()


if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    from prometheus_client import CollectorRegistry, make_asgi_app
    from prometheus_client.multiprocess import MultiProcessCollector

    from page_primer.integrations import prometheus

    prometheus.export()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    app.mount("/metrics", make_asgi_app(registry))
