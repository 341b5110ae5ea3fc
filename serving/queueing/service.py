"""All bundles that are served, by name, and what waits for them."""

from collections.abc import Mapping

from engines.support.spelling import did_you_mean
from runtime import Pipeline, Request
from runtime.pipeline import Callback
from serving.errors import ServingError, StoppingError, UnknownModelError
from serving.limits import Limits
from serving.queueing.kinds import admit
from serving.queueing.ticket import Ticket
from serving.queueing.worker import STOPPING, Watch, Worker

__all__ = ["Service"]


class Service:
    """Takes requests for pictures of several bundles, from any thread.

    Plans of requests may switch to the UNets of bundles that are served, and to no others that lie beside them.

    Args:
        pipelines: by the name that requests call them; the first is the one of requests that name none. They stay as they are:
            calls of their own beside it are not bound by what a request may do.
        limits: what a request may ask for.
        watch: is told of every batch.

    Raises:
        ServingError: there is no pipeline, or the limits fit no request.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], limits: Limits | None = None, watch: Watch | None = None) -> None:
        if not pipelines:
            raise ServingError("there is no bundle to serve; name one, as a build makes it: python -m exporter build")
        bundles = [pipeline.bundle for pipeline in pipelines.values()]
        self.pipelines = {name: pipeline.with_siblings(bundles) for name, pipeline in pipelines.items()}
        self.limits = limits or Limits()
        self.workers = {name: Worker(name, pipeline, self.limits, watch) for name, pipeline in self.pipelines.items()}
        self.is_stopping = False

    def start(self) -> None:
        """Begin to make pictures."""
        for worker in self.workers.values():
            worker.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return not self.is_stopping and all(worker.is_alive() for worker in self.workers.values())

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits or runs."""
        return all(worker.is_idle for worker in self.workers.values())

    def worker(self, model: str | None) -> Worker:
        """Who makes the pictures of a model, or of the first one; raises UnknownModelError where there is none of the name."""
        if model is None:
            return next(iter(self.workers.values()))
        if model not in self.workers:
            names = ", ".join(self.workers)
            raise UnknownModelError(f"there is no model {model!r:.100}; {did_you_mean(model, self.workers)}choose from: {names}")
        return self.workers[model]

    def submit(self, model: str | None, request: Request, step: Callback | None = None) -> Ticket:
        """Let a request wait for its pictures, which ``Ticket.future`` will have.

        Args:
            model: who makes them; None for the first.
            request: what is made.
            step: is told of every step that was done; such a request shares no batch.

        Raises:
            UnknownModelError: nobody makes its pictures.
            RequestError, PlanError: it asks for what cannot be had or is not allowed.
            BusyError, StoppingError: nothing is taken now.
        """
        worker = self.worker(model)
        worker.expect()
        try:
            ticket = admit(worker.pipeline, request, self.limits, step)
        except BaseException:
            worker.give_up()
            raise
        worker.put(ticket)
        return ticket

    def stop_accepting(self) -> None:
        """Refuse what comes from now on; what was taken is finished."""
        self.is_stopping = True
        for worker in self.workers.values():
            worker.stop_accepting()

    def end(self) -> None:
        """Refuse what waits, stop what runs after its step, and end."""
        self.stop_accepting()
        for worker in self.workers.values():
            worker.end()

    def check_accepting(self) -> None:
        """Raise StoppingError where nothing is taken any more."""
        if self.is_stopping:
            raise StoppingError(STOPPING)
