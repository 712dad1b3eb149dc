"""Converts temperatures."""

import os

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
async def health() -> dict[str, int | str | None]:
    """The state of the worker that answers: with nothing new, prime() gives the report there is."""
    report = page_primer.prime()
    huge = {"code_bytes": report.code_bytes, "code_huge_bytes": report.code_huge_bytes}
    return {"pid": os.getpid(), "reason": report.reason, **huge}


if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    from prometheus_client import CollectorRegistry, make_asgi_app
    from prometheus_client.multiprocess import MultiProcessCollector

    from page_primer.integrations import prometheus

    prometheus.export()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    app.mount("/metrics", make_asgi_app(registry))
