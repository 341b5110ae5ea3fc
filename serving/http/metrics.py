"""The service's counters, in Prometheus' form."""

from http import HTTPStatus

from runtime import Generation
from serving.http.faults import GONE
from serving.queueing.worker import Worker

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 300)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16, 32)
_OUTCOMES: dict[int, str] = {
    HTTPStatus.OK: "made",
    HTTPStatus.TOO_MANY_REQUESTS: "queue_full",
    GONE: "gone",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
    HTTPStatus.GATEWAY_TIMEOUT: "late",
}


class Metrics:
    """Counters of one app, in a registry of their own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        name, registry = "unet_heirloom", self.registry
        self._requests = Counter(
            f"{name}_requests", "Requests by endpoint and outcome", ["endpoint", "outcome"], registry=registry
        )
        self._seconds = Histogram(
            f"{name}_request_seconds",
            "Seconds of requests whose pictures were made, waiting included",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge(f"{name}_waiting_pictures", "Pictures that no batch has taken", ["model"], registry=registry)
        self._batches = Histogram(
            f"{name}_batch_pictures", "Pictures made at once", ["model"], buckets=_PICTURES, registry=registry
        )
        self._per_picture = Histogram(
            f"{name}_picture_seconds",
            "Seconds of a batch, for each of its pictures",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._per_step = Histogram(
            f"{name}_step_seconds", "Seconds of a denoising step of a batch", ["model"], buckets=_STEP_SECONDS, registry=registry
        )

    def watch_queue(self, worker: Worker) -> None:
        """Ask for the length of a worker's queue whenever somebody reads it."""
        self._waiting.labels(worker.model).set_function(lambda: worker.waiting)

    def batch(self, model: str, generation: Generation) -> None:
        """A batch of a model is done."""
        count = len(generation.images)
        self._batches.labels(model).observe(count)
        for _ in range(count):
            self._per_picture.labels(model).observe(generation.seconds / count)
        for record in generation.steps:
            self._per_step.labels(model).observe(record.seconds)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered with one of HTTP's numbers, so long after it came."""
        failed = "failed" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "refused"
        outcome = _OUTCOMES.get(status, failed)
        self._requests.labels(endpoint, outcome).inc()
        if status == HTTPStatus.OK:
            self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        from prometheus_client import generate_latest

        return generate_latest(self.registry)
