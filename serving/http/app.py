"""The HTTP service as an ASGI app: which address gives what."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from engines.support.version import our_version
from runtime import Pipeline
from serving.http import native, openai_images
from serving.http.calls import Calls
from serving.http.faults import add_handlers
from serving.http.interface_page import HEADERS, interface_page
from serving.http.keys import check_key
from serving.http.metrics import Metrics
from serving.limits import Limits
from serving.queueing.service import Service

if TYPE_CHECKING:
    from fastapi import APIRouter, FastAPI

__all__ = ["keep_own_addresses", "make_app"]

_ABOUT = "Pictures from prompts. Sizes are WIDTHxHEIGHT in OpenAI's form, and `height` and `width` in ours."
_METHODS = {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"}


def make_app(pipelines: Mapping[str, Pipeline], limits: Limits | None = None, key: str | None = None) -> "FastAPI":
    """The service as an ASGI app; its ``state.service`` makes the pictures, from the app's start to its end.

    Args:
        pipelines: what is served, by the names that requests call them.
        limits: what a request may ask for.
        key: which requests for pictures, models and metrics must carry as ``Authorization: Bearer KEY``; None for no key.

    Raises:
        ServingError: there is nothing to serve.
    """
    from fastapi import FastAPI

    metrics = Metrics()
    service = Service(pipelines, limits, metrics)
    for worker in service.workers.values():
        metrics.watch_queue(worker)
    hidden = _hidden(pipelines)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.end()

    app = FastAPI(
        title="UNet Heirloom", version=our_version(), description=_ABOUT, lifespan=running, docs_url=None, redoc_url=None
    )
    app.state.service = service
    _add_page_of_interface(app)
    add_handlers(app, hidden)
    app.include_router(_pictures(Calls(service, metrics, hidden), key))
    app.include_router(_about(service, metrics, key))
    app.include_router(_health(service))
    return app


def _hidden(pipelines: Mapping[str, Pipeline]) -> dict[str, str]:
    """Texts that tell of this machine, where bundles lie and were made from, and what stands for them."""
    found = {str(Path.cwd()): "[path]", str(Path.home()): "[path]"}
    for name, pipeline in pipelines.items():
        found |= {pipeline.manifest.source: "[source]", str(pipeline.bundle.folder.parent): "[path]"}
        found[str(pipeline.bundle.folder)] = name
    return {text: instead for text, instead in found.items() if "/" in text.strip("/") or "\\" in text}


def _pictures(calls: Calls, key: str | None) -> "APIRouter":
    """The two addresses that make pictures."""
    from fastapi import APIRouter, Request
    from starlette.responses import Response

    router = APIRouter(tags=["pictures"], dependencies=_needs(key))

    @router.post("/v1/images/generations", summary="In OpenAI's form", openapi_extra=_takes(openai_images.SCHEMA))
    async def generations(http: Request) -> Response:
        return await calls.answer(http, "openai", openai_images.read, openai_images.tell)

    @router.post("/generate", summary="With all that runtime.Request has", openapi_extra=_takes(native.SCHEMA))
    async def generate(http: Request) -> Response:
        return await calls.answer(http, "generate", native.read, native.tell)

    return router


def _about(service: Service, metrics: Metrics, key: str | None) -> "APIRouter":
    """The addresses that say which models are served, and how the service fares."""
    from fastapi import APIRouter
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.responses import Response

    router, created = APIRouter(tags=["service"], dependencies=_needs(key)), int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": created, "owned_by": "unet-heirloom"}

    @router.get("/v1/models", summary="What is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in service.workers]}

    @router.get("/v1/models/{name}", summary="Whether a model is served")
    async def model(name: str) -> dict[str, Any]:
        return entry(service.worker(name).model)

    @router.get("/metrics", summary="Counters, for Prometheus")
    async def counters() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _health(service: Service) -> "APIRouter":
    """The addresses that a load balancer asks, without a key."""
    from fastapi import APIRouter
    from starlette.responses import JSONResponse

    router = APIRouter(tags=["service"])

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/readyz", summary="Whether requests are taken: 503 where they are not")
    async def readyz() -> JSONResponse:
        status = "ready" if service.is_ready else "stopping" if service.is_stopping else "not started"
        return JSONResponse({"status": status}, 200 if service.is_ready else 503)

    return router


def _add_page_of_interface(app: "FastAPI") -> None:
    """``/docs``, for people. FastAPI's own would have their browsers fetch its script from another server."""
    from starlette.responses import HTMLResponse

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(interface_page(app.openapi()), headers=HEADERS)


def keep_own_addresses(app: "FastAPI") -> None:
    """Have the app itself refuse other methods than its addresses take, and addresses below ``/v1`` that there are not.

    A page at the root would be asked for them otherwise: it takes all that no route takes, and its answers have another form.
    """
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import Response

    def refusing(allowed: str) -> Callable[[Request], Awaitable[Response]]:
        async def refuse(http: Request) -> Response:
            raise HTTPException(405, headers={"Allow": allowed})

        return refuse

    async def no_address(http: Request) -> Response:
        raise HTTPException(404)

    for path, operations in app.openapi()["paths"].items():
        methods = {name.upper() for name in operations}
        app.add_route(path, refusing(", ".join(sorted(methods))), sorted(_METHODS - methods), include_in_schema=False)
    app.add_route("/v1/{rest:path}", no_address, sorted(_METHODS), include_in_schema=False)


def _takes(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _needs(key: str | None) -> list[Any]:
    """The dependency that refuses calls without the key, before their bodies are read; none without a key."""
    if key is None:
        return []
    from fastapi import Depends
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

    bearer = HTTPBearer(auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        check_key(None if given is None else given.credentials, key)

    return [Depends(check)]
