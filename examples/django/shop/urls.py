"""The shop's pages."""

import os

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

import page_primer

PRICES = {"teapot": 12, "kettle": 30}


def price(_: HttpRequest, article: str) -> HttpResponse:
    if article not in PRICES:
        return JsonResponse({"error": f"no {article} here"}, status=404)
    return JsonResponse({"article": article, "price": PRICES[article]})


def health(_: HttpRequest) -> HttpResponse:
    """How the worker that answers is primed."""
    return JsonResponse(page_primer.status())


def metrics(_: HttpRequest) -> HttpResponse:
    """The figures of all workers, from the files in PROMETHEUS_MULTIPROC_DIR."""
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return HttpResponse(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


urlpatterns = [path("price/<article>", price), path("health", health)]
if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
    urlpatterns.append(path("metrics", metrics))
