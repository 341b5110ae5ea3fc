"""The page as Gradio's blocks in an application: what ties its parts to ``Site``, and what Gradio is kept from."""

import functools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from runtime import Pipeline, Plan
from serving.page.asked import size_names
from serving.page.layout import Parts, gradio, lay_out
from serving.page.site import Site
from serving.page.theme import CSS, theme
from serving.page.views import NOTHING_MADE, PARTS, View, status
from serving.queueing.service import Service

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

__all__ = ["make_page", "mount_page"]

_UPLOAD_BYTES = 20 * 2**20
_AT_ONCE = 8
"""Visitors' calls in the queue: each takes a thread of some forty that answer browsers."""
_WAITING = 32
"""Calls that wait to get into it; more are turned away."""
_KEPT_SECONDS = 3600
"""How long pictures and uploads are kept."""
_REFUSED = "This cannot be done"
_CONTROLS = ("prompt", "negative", "seed", "steps", "size", "scheduler", "guidance", "edited", "strength", "preview", "compare")
"""The parts whose values are those of ``Asked``."""


def make_page(served: Service | Mapping[str, Pipeline], at_once: int = _AT_ONCE) -> "gr.Blocks":
    """The page for loaded bundles. ``mount_page`` puts it into an application.

    Args:
        served: the service whose queue visitors' calls wait in, beside all others; or loaded bundles by the names that they are
            shown under, which then have a queue of their own until the process ends.
        at_once: how many visitors' calls are in the queue at the same time; more wait before it.

    Raises:
        ServingError: no bundle, or Gradio is not installed.
    """
    gr = gradio()
    site = Site(served if isinstance(served, Service) else _started(served))
    with gr.Blocks(title="unet-heirloom", analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS), fill_width=True) as page:
        parts = lay_out(site)
        _tie(page, site, parts, at_once)
    page.queue(max_size=_WAITING, api_open=False)
    # Gradio 6 asks whether a file was uploaded only of pages that were launched, which a mounted one never is: without this, a
    # visitor could have any picture of the server opened by its path.
    page.has_launched = True
    return page  # type: ignore[no-any-return]


def _started(pipelines: Mapping[str, Pipeline]) -> Service:
    service = Service(pipelines)
    service.start()
    return service


def mount_page(
    app: "FastAPI",
    served: Service | Mapping[str, Pipeline],
    path: str = "/",
    at_once: int = _AT_ONCE,
    *,
    may_enter: Callable[[str, str], bool] | None = None,
    upload_bytes: int = _UPLOAD_BYTES,
) -> "FastAPI":
    """Put the page into an application, behind the routes that it has already.

    No file of the server can be asked for through it but those that the page itself showed, and it asks no other server for
    anything.

    Args:
        app: the application.
        served: as ``make_page``.
        path: where the page is.
        at_once: as ``make_page``.
        may_enter: whether a visitor with a name and a password is let in; without it, all are.
        upload_bytes: the largest file that a visitor may send.

    Raises:
        ServingError: as ``make_page``.
    """
    gr, page = gradio(), make_page(served, at_once)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page,
        path=path,
        allowed_paths=[],
        show_error=False,
        auth=may_enter,
        max_file_size=upload_bytes,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=theme(),
        css=CSS,
    )
    return mounted


def _tie(page: Any, site: Site, parts: Parts, at_once: int) -> None:
    """Tie each part to the function that is called when it is touched. None of these is an endpoint for other programs."""
    gr = gradio()
    quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    told = [parts["bundle"], parts["plan"], parts["steps"], parts["uploaded"]]

    parts["dice"].click(site.dice, None, parts["seed"], **quick)
    parts["speed"].input(_safely(site, site.plan_at), [parts["bundle"], parts["speed"]], parts["plan"], **quick)
    for each in (parts["plan"], parts["steps"]):
        each.change(site.describe, told, [parts["cost"], parts["strip"]], trigger_mode="always_last", **quick)
    parts["plan"].change(
        _safely(site, functools.partial(_moved, gr, site)), [parts["bundle"], parts["plan"]], parts["speed"], **quick
    )
    parts["upload"].upload(
        _safely(site, functools.partial(_uploaded, gr, site)), [parts["bundle"], parts["upload"]],
        [parts["uploaded"], parts["plan"]], **quick,
    )  # fmt: skip
    parts["bundle"].change(
        _safely(site, functools.partial(_of_bundle, gr, site)), parts["bundle"],
        [parts["speed"], parts["plan"], parts["size"], parts["guidance"], parts["uploaded"]], **quick,
    ).then(site.describe, told, [parts["cost"], parts["strip"]], **quick)  # fmt: skip
    for each in (parts["upload"], parts["edited"]):
        each.async_move_resource_to_block_cache = _only_uploads(each.async_move_resource_to_block_cache)
    _tie_calls(page, site, parts, at_once, quick)


def _only_uploads(move: Callable[[str], Awaitable[str]]) -> Callable[[str], Awaitable[str]]:
    """How Gradio takes a visitor's file, but for files that are named by an address, which it would fetch."""

    async def take(path: str) -> str:
        if "://" in str(path):
            raise gradio().Error("the page fetches no file by its address; upload it", title=_REFUSED, print_exception=False)
        return await move(path)

    return take


def _tie_calls(page: Any, site: Site, parts: Parts, at_once: int, quick: dict[str, Any]) -> None:
    gr = gradio()
    from gradio import Request

    shown, buttons = parts.all((*PARTS, "again")), [parts["generate"], parts["cancel"]]

    def begin(request: Request) -> tuple[str, Any, Any]:
        return site.begin(_visitor(request)), gr.update(interactive=False), gr.update(interactive=True)

    def generate(request: Request, bundle: Any, plan: Any, uploaded: Plan | None, *values: Any) -> Iterator[dict[Any, Any]]:
        asked = dict(zip(_CONTROLS, values, strict=True))
        for view in site.generate(_visitor(request), bundle, plan, uploaded, **asked):
            yield _updates(gr, parts, view)

    def cancel(request: Request) -> None:
        site.calls.cancel(_visitor(request))

    def leave(request: Request) -> None:
        site.calls.forget(_visitor(request))

    def end(told: str) -> tuple[Any, Any, Any]:
        """Free the buttons, however the call ended. If Gradio turned it away, nothing began, and the status says so."""
        lost = gr.update(value=status("wrong", NOTHING_MADE)) if "status running" in told else gr.skip()
        return lost, gr.update(interactive=True), gr.update(interactive=False)

    inputs = parts.all(("bundle", "plan", "uploaded", *_CONTROLS))
    for touched in (parts["generate"].click, parts["prompt"].submit):
        touched(begin, None, [parts["status"], *buttons], **quick).then(
            generate,
            inputs,
            shown,
            concurrency_limit=at_once,
            concurrency_id="calls",
            show_progress="hidden",
            api_visibility="private",
        ).then(end, parts["status"], [parts["status"], *buttons], **quick)
    parts["cancel"].click(cancel, None, None, **quick)
    page.unload(leave)


def _visitor(request: Any) -> str:
    return str(request.session_hash)


def _updates(gr: Any, parts: Parts, view: View) -> dict[Any, Any]:
    """New values for the page's parts; what there is nothing of is not shown."""
    updates: dict[Any, Any] = {}
    for name, value in view.items():
        hides = name in {"full", "difference", "files"}
        updates[parts[name]] = gr.update(value=value, visible=value is not None) if hides else gr.update(value=value)
    if "python" in view:
        updates[parts["again"]] = gr.update(visible=view["python"] is not None)
    return updates


def _safely(site: Site, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose errors are said as one line on the page."""

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            raise gradio().Error(escape(site.said(error), quote=False), title=_REFUSED, print_exception=False) from None

    return call


def _moved(gr: Any, site: Site, bundle: str, plan: str) -> Any:
    """The slider where the plan stands; where it stood, if that is nowhere on it."""
    place = site.place_of(bundle, plan)
    return gr.skip() if place is None else gr.update(value=place)


def _uploaded(gr: Any, site: Site, bundle: str, path: str | None) -> tuple[Plan | None, Any]:
    if path is None:
        return None, gr.update()
    plan = site.read_plan(path)
    return plan, gr.update(choices=site.plan_names(bundle, plan), value=plan.name)


def _of_bundle(gr: Any, site: Site, bundle: str) -> tuple[Any, Any, Any, Any, None]:
    """New values of the controls that depend on the bundle: speed, plan, sizes and guidance. An uploaded plan is dropped."""
    manifest, at = site.pipeline(bundle).manifest, site.first_rung(bundle)
    sizes = size_names(manifest)
    return (
        gr.update(maximum=max(1, len(site.rungs[bundle]) - 1), value=at),
        gr.update(choices=site.plan_names(bundle), value=site.plan_at(bundle, at)),
        gr.update(choices=sizes, value=sizes[0]),
        gr.update(value=manifest.guidance_scale),
        None,
    )
