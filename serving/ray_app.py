"""The HTTP service on many GPUs or machines, as an application of Ray Serve: ``serve run serving.ray_app:app bundle=DIR ...``.

Replicas hold a loaded bundle each and make batches of one kind, as the service of one machine does. In front of them stand
processes without a model, which read requests, hand them to a replica, and to another one where that dies.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from engines import Bundle, engine_class
from engines.support.extras import need
from engines.support.files import expanded, is_folder
from engines.support.records import Record
from runtime import load
from serving.command.api_key import read_key
from serving.errors import BusyError, ServingError, StoppingError
from serving.fetching import COPY, bundle_folder
from serving.http.body import Bodies, read_body
from serving.http.keys import check_key
from serving.limits import Limits
from serving.queueing.service import Service
from serving.queueing.ticket import Ticket, waited_for

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

__all__ = ["Arguments", "Front", "Pictures", "app"]

_LOG = logging.getLogger("ray.serve")
_PLACES = {"/generate": "generate", "/v1/images/generations": "openai"}
"""Where pictures are asked for, and in which form."""
_PAUSE = 0.2
"""Seconds before a request is handed to another replica; after each further try twice as long."""
Answer = tuple[int, dict[str, str], bytes]
"""HTTP's number, headers and body."""


class Arguments(Record):
    """The arguments of ``serve run serving.ray_app:app NAME=VALUE ...``, or ``args`` in a configuration of Ray Serve."""

    bundle: str
    """A folder that every machine sees, or where it is brought from once: see ``serving.fetching``."""
    name: str = "model"
    """The model's name in requests."""
    engine: str = "onnxruntime"
    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=1, ge=1)
    """With as many as at least, their number is fixed; otherwise it follows how many requests wait."""
    upscale_after: float = Field(default=30, ge=0)
    downscale_after: float = Field(default=600, ge=0)
    """Seconds that more or fewer requests have to last before there are more or fewer replicas."""
    cpus: float = Field(default=1, ge=0)
    """Cores of each replica."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of each replica, or a part of one."""
    fronts: int = Field(default=1, ge=1)
    """Processes that read requests."""
    batch: int = Field(default=8, ge=1)
    batch_wait_ms: float = Field(default=5, ge=0)
    queue: int = Field(default=64, ge=1)
    """Requests that wait in front of the replicas; more are answered 429."""
    timeout: float = Field(default=300, gt=0)
    tries: int = Field(default=5, ge=1)
    """Replicas that a request is handed to, one after another, where they die."""

    @property
    def limits(self) -> Limits:
        """The limits of each replica; the others are the usual ones."""
        return Limits(batch=self.batch, batch_wait=self.batch_wait_ms / 1000, seconds=self.timeout, queue=4 * self.queue)


def app(args: Arguments) -> "Application":
    """The application; raises ServingError where Ray is not installed, or for arguments that contradict each other; EngineError
    for an engine that there is not; BundleError for a bundle that lies on this machine and is none.

    Where it is deployed again with other arguments, Ray Serve replaces one replica after another, and each finishes what it has.
    The bundle is part of the replicas' ``user_config``: where that alone is changed, in Ray Serve's configuration, they load the
    other bundle beside the first while that goes on, and then change over, without being started anew.
    """
    need("ray", "serving.ray_app", "ray", ServingError)
    from ray import serve

    if args.min_replicas > args.max_replicas:
        raise ServingError(f"min_replicas={args.min_replicas} max_replicas={args.max_replicas}: give at least as many as most")
    engine_class(args.engine)
    folder = expanded(args.bundle.removeprefix(COPY))
    if is_folder(folder):  # otherwise it may be on others
        Bundle.open(folder)
    ongoing = 4 * args.batch  # one batch is made, and the next ones wait beside it
    scale: dict[str, Any] = (
        {"num_replicas": args.max_replicas}
        if args.min_replicas == args.max_replicas
        else {
            "autoscaling_config": {
                "min_replicas": args.min_replicas,
                "max_replicas": args.max_replicas,
                "target_ongoing_requests": args.batch,
                "upscale_delay_s": args.upscale_after,
                "downscale_delay_s": args.downscale_after,
                "look_back_period_s": max(1.0, min(30.0, args.upscale_after)),
            }
        }
    )
    pictures = serve.deployment(
        user_config={"bundle": args.bundle, "name": args.name},
        ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=args.queue,
        graceful_shutdown_timeout_s=args.timeout,
        health_check_period_s=5,
        **scale,
    )(Pictures)
    front = serve.deployment(
        num_replicas=args.fronts,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=args.queue + ongoing * args.max_replicas,
        graceful_shutdown_timeout_s=args.timeout,  # what it waits for is not lost where it is replaced
    )(Front)
    return front.bind(pictures.bind(args.engine, args.limits), args.limits, args.tries)


class Pictures:
    """A replica: a loaded bundle with its queue, which Ray gives its GPU and, by ``reconfigure``, its bundle."""

    def __init__(self, engine: str, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._service: Service | None = None

    async def reconfigure(self, user_config: Mapping[str, str]) -> None:
        """Change over to a bundle when it is loaded; what was taken before is finished with the old one."""
        new = await asyncio.to_thread(self._loaded, user_config)
        old, self._service = self._service, new
        if old is not None:
            old.stop_accepting()
            while not old.is_idle:
                await asyncio.sleep(0.05)
            old.end()

    def _loaded(self, config: Mapping[str, str]) -> Service:
        service = Service({config["name"]: load(bundle_folder(config["bundle"]), self._engine)}, self._limits)
        service.start()
        return service

    @property
    def service(self) -> Service:
        """The service that makes the pictures now; raises StoppingError while there is none."""
        if self._service is None:
            raise StoppingError("no bundle is loaded yet; ask again in a while")
        return self._service

    def check_health(self) -> None:
        """Raise StoppingError where nothing is made any more: Ray then starts another replica."""
        if self._service is not None and not self._service.is_ready:
            raise StoppingError("the thread that makes pictures has ended")

    async def pid(self) -> int:
        """The number of its process."""
        return os.getpid()

    async def models(self) -> list[str]:
        """The names that requests may call."""
        return list(self.service.workers)

    async def answer(self, form: str, body: bytes) -> Answer:
        """The answer to a request for pictures, whatever becomes of it."""
        from starlette.responses import JSONResponse

        from serving.http.faults import answer

        try:
            response = JSONResponse(await self._made(form, body))
        except Exception as error:
            response = answer(error)
        return response.status_code, dict(response.headers), bytes(response.body)

    async def _made(self, form: str, body: bytes) -> dict[str, Any]:
        from serving.http import native, openai_images
        from serving.http.body import parse_object

        module = native if form == "generate" else openai_images
        asked = await asyncio.to_thread(lambda: module.read(parse_object(body), self._limits))
        service, ticket = await self._submitted(asked.model, asked.request)
        made = await waited_for(ticket)
        assert made is not None, "a call of Ray Serve is cancelled where its caller leaves"
        return await asyncio.to_thread(module.tell, asked, service.worker(asked.model).model, made)

    async def _submitted(self, model: str | None, request: Any) -> tuple[Service, Ticket]:
        while True:
            service = self.service
            try:
                return service, await asyncio.to_thread(service.submit, model, request)
            except StoppingError:
                if service is self._service:
                    raise  # otherwise it was changed for another just now


class Front:
    """Reads requests and has replicas answer them; where one dies in the middle, the next gets its requests.

    Args:
        pictures: Ray's handle of the replicas.
        limits: of a request's body.
        tries: replicas that a request is handed to.
    """

    def __init__(self, pictures: Any, limits: Limits, tries: int) -> None:
        self._pictures, self._limits, self._tries = pictures, limits, tries
        self._key, self._bodies = read_key(None), Bodies(limits)

    async def __call__(self, http: "HttpRequest") -> "Response":
        """The answer to a call of HTTP."""
        from starlette.responses import JSONResponse, Response

        from serving.http.faults import answer

        path, form = http.url.path, _PLACES.get(http.url.path)
        try:
            if path == "/healthz":
                return JSONResponse({"status": "ok"})
            self._check_key(http.headers.get("authorization", ""))
            if form is not None and http.method == "POST":
                with self._bodies.room_for(http):
                    body = await read_body(http, self._limits)
                    status, headers, content = await self._retried(lambda: self._pictures.answer.remote(form, body))
                return Response(content, status, headers)
            if path == "/v1/models":
                names = await self._retried(self._pictures.models.remote)
                return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})
        except Exception as error:
            return answer(error)
        return JSONResponse({"error": {"message": f"there is nothing at {http.method} here"}}, 404)

    def _check_key(self, header: str) -> None:
        kind, _, given = header.partition(" ")
        if self._key is not None:
            check_key(given if kind.lower() == "bearer" else None, self._key)

    async def _retried(self, call: Callable[[], Awaitable[Any]]) -> Any:
        """The answer of a replica. A request holds all that its pictures are made from, so they may be made twice."""
        from ray.exceptions import RayActorError, WorkerCrashedError
        from ray.serve.exceptions import BackPressureError

        for number in range(self._tries):
            try:
                return await call()
            except (RayActorError, WorkerCrashedError) as error:
                _LOG.warning("a replica died with a request (%s); another one gets it", type(error).__name__)
                await asyncio.sleep(_PAUSE * 2**number)
            except BackPressureError as error:
                raise BusyError("too many requests are waiting; ask again in 1 s", 1) from error
        raise StoppingError(f"{self._tries} replicas died with this request; ask again in a while")
