"""A Celery application whose tasks use numpy and pandas."""

import os

from celery import Celery

app = Celery("work")
app.config_from_object("celeryconfig")
if "BROKER" in os.environ:
    app.conf.update(broker_url=os.environ["BROKER"], result_backend=os.environ["BROKER"])
if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    import monitoring  # noqa: F401 (connects its signals)


@app.task
def summary(seed: int, rows: int) -> dict[str, float]:
    import numpy
    import pandas

    values = numpy.random.default_rng(seed).normal(size=(rows, 3))
    frame = pandas.DataFrame(values, columns=["a", "b", "c"])
    return {name: round(float(value), 6) for name, value in frame.mean().items()}
