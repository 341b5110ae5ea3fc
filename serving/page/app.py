"""The page's parts and what ties them to ``Site``. Gradio is imported when a page is made, and nothing else knows of it."""

import functools
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from engines.support.extras import need
from runtime import Pipeline, Plan
from runtime.images.schedulers import SCHEDULERS
from serving.errors import ServingError
from serving.page.asked import MOST_STEPS, size_names
from serving.page.look import CSS, theme
from serving.page.site import Site
from serving.page.views import NOTHING_MADE, PARTS, View, status

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

__all__ = ["make_page", "mount_page"]

_EXAMPLE = "a red star on a blue background"
_UPLOAD_BYTES = "20mb"
_WAITING = 32
"""Calls that wait for their turn; more are turned away."""
_KEPT_SECONDS = 3600
"""How long pictures and uploads are kept."""
_REFUSED = "This cannot be done"
_CONTROLS = ("prompt", "negative", "seed", "steps", "size", "scheduler", "guidance", "edited", "strength", "preview", "compare")
"""The parts whose values are those of ``Asked``."""


def make_page(pipelines: Mapping[str, Pipeline], at_once: int = 1) -> "gr.Blocks":
    """The page for loaded bundles, by the names that they are shown under. ``mount_page`` puts it into an application.

    Args:
        pipelines: at least one.
        at_once: how many visitors' pictures are made at the same time; the others wait.

    Raises:
        ServingError: no bundle, or Gradio is not installed.
    """
    gr = _gradio()
    site = Site(pipelines)
    with gr.Blocks(title="unet-heirloom", analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS), fill_width=True) as page:
        parts = _lay_out(site)
        _tie(page, site, parts, at_once)
    page.queue(max_size=_WAITING, api_open=False)
    # Gradio 6 asks whether a file was uploaded only of pages that were launched, which a mounted one never is: without this, a
    # visitor could have any picture of the server opened by its path.
    page.has_launched = True
    return page  # type: ignore[no-any-return]


def mount_page(app: "FastAPI", pipelines: Mapping[str, Pipeline], path: str = "/", at_once: int = 1) -> "FastAPI":
    """Put the page into an application, behind the routes that it has already; arguments as ``make_page``.

    No file of the server can be asked for through it but those that the page itself showed, and it asks no other server for
    anything.
    """
    gr, page = _gradio(), make_page(pipelines, at_once)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page,
        path=path,
        allowed_paths=[],
        show_error=False,
        max_file_size=_UPLOAD_BYTES,
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


def _gradio() -> Any:
    """Gradio, which is told not to phone home before it is imported."""
    need("gradio", "the page", "serve", ServingError)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio


@dataclass(frozen=True)
class _Parts:
    """The page's components, by name."""

    by_name: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]

    def all(self, names: tuple[str, ...]) -> list[Any]:
        return [self.by_name[name] for name in names]


def _lay_out(site: Site) -> _Parts:
    gr = _gradio()
    manifest = site.pipelines[site.first].manifest
    cost, strip = site.describe(site.first, site.plan_at(site.first, site.first_rung(site.first)), 20)
    made: dict[str, Any] = {"uploaded": gr.State(None)}
    gr.HTML(_title(site), elem_id="title")
    with gr.Row(elem_id="room"):
        with gr.Column(elem_id="ask"):
            made |= _ask(gr, site, cost)
        with gr.Column(elem_id="made"):
            made |= _results(gr, strip)
        with gr.Column(elem_id="more"):
            made |= _more(gr, manifest)
    return _Parts(made)


def _title(site: Site) -> str:
    engines = dict.fromkeys(pipeline.engine.name for pipeline in site.pipelines.values())
    told = escape(f"{', '.join(site.pipelines)} on {', '.join(engines)}")
    return f"<h1>unet-heirloom</h1><p>a UNet that inherits features instead of computing them again · {told}</p>"


def _ask(gr: Any, site: Site, cost: str) -> dict[str, Any]:
    """Prompt, buttons, and the plan."""
    first, source = site.first, site.pipelines[site.first].manifest.source
    made = {
        "bundle": gr.Dropdown([*site.pipelines], value=first, label="bundle", visible=len(site.pipelines) > 1, elem_id="bundle"),
        "prompt": gr.Textbox(
            _EXAMPLE if source == "mini" else "", label="prompt", placeholder=_EXAMPLE, lines=2, max_lines=6, elem_id="prompt"
        ),
    }
    with gr.Row(elem_id="buttons"):
        made["generate"] = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
        made["cancel"] = gr.Button("Cancel", variant="stop", elem_id="cancel", interactive=False, scale=1)
    made["status"] = gr.HTML(status("idle", "ready"), elem_id="status")
    names, at = site.plan_names(first), site.first_rung(first)
    made["speed"] = gr.Slider(
        0, max(1, len(site.rungs[first]) - 1), at, step=1, label="quality  →  speed", elem_id="speed", buttons=[]
    )
    with gr.Row(elem_id="plan-row"):
        made["plan"] = gr.Dropdown(
            names, value=site.plan_at(first, at), allow_custom_value=True, label="plan", elem_id="plan", scale=3, min_width=140
        )
        made["upload"] = gr.UploadButton(
            "Upload a plan", file_types=[".json"], type="filepath", elem_id="upload", scale=1, min_width=90, size="sm"
        )
    made["cost"] = gr.HTML(cost, elem_id="cost")
    made["compare"] = gr.Checkbox(False, label="compare with full", elem_id="compare")
    return made


def _more(gr: Any, manifest: Any) -> dict[str, Any]:
    """What most visitors leave as it is."""
    sizes, made = size_names(manifest), dict[str, Any]()
    with gr.Accordion("Settings", open=True, elem_id="settings"):
        made["negative"] = gr.Textbox(label="negative prompt", elem_id="negative")
        with gr.Row(elem_id="seed-row"):
            made["seed"] = gr.Number(0, label="seed", precision=0, elem_id="seed", min_width=80)
            made["dice"] = gr.Button("⚄", elem_id="dice")
        made["steps"] = gr.Slider(1, MOST_STEPS, 20, step=1, label="steps", elem_id="steps", buttons=[])
        with gr.Row():
            made["size"] = gr.Dropdown(sizes, value=sizes[0], label="size", elem_id="size", min_width=110)
            made["scheduler"] = gr.Dropdown(
                [*SCHEDULERS], value="dpm++", allow_custom_value=True, label="scheduler",
                elem_id="scheduler", min_width=110,
            )  # fmt: skip
        made["guidance"] = gr.Slider(1, 20, manifest.guidance_scale, step=0.5, label="guidance", elem_id="guidance", buttons=[])
        made["preview"] = gr.Slider(0, 20, 4, step=1, label="a preview every … steps (0: none)", elem_id="preview", buttons=[])
    with gr.Accordion("Start from a picture", open=False, elem_id="start"):
        gr.HTML("Open a picture here. To change a part of it only, paint over that part.")
        made["edited"] = gr.ImageEditor(
            type="pil", image_mode="RGBA", sources=["upload", "clipboard"], transforms=["crop"], layers=False, format="png",
            brush=gr.Brush(colors=["#e07a5f"], color_mode="fixed"), label="picture",
            elem_id="edited", buttons=[],
        )  # fmt: skip
        made["strength"] = gr.Slider(0.05, 1, 0.6, step=0.05, label="strength", elem_id="strength", buttons=[])
    return made


def _results(gr: Any, strip: str) -> dict[str, Any]:
    """Pictures, figures, strip, and the texts that make the picture again."""
    made, kept = dict[str, Any](), ["download", "fullscreen"]
    with gr.Row(elem_id="pictures"):
        for name, label in (("picture", "picture"), ("full", "the same in full"), ("difference", "difference, × 8")):
            made[name] = gr.Image(
                label=label, elem_id=name, interactive=False, visible=name == "picture", format="png", buttons=kept
            )
    made["figures"] = gr.HTML("", elem_id="figures")
    made["strip"] = gr.HTML(strip, elem_id="strip")
    text = {"buttons": ["copy"], "wrap_lines": True, "show_label": False, "interactive": False}
    with gr.Accordion("Copy as Python or command", open=False, elem_id="again", visible=False) as made["again"]:
        with gr.Tab("Python"):
            made["python"] = gr.Code("", language="python", elem_id="python", **text)
        with gr.Tab("command"):
            made["command"] = gr.Code(
                "", language="shell", buttons=["copy"], wrap_lines=True, elem_id="command", show_label=False
            )
        made["files"] = gr.File(label="what they read", visible=False, file_count="multiple", elem_id="files")
    return made


def _tie(page: Any, site: Site, parts: _Parts, at_once: int) -> None:
    """What happens when a part is touched. None of it is an endpoint that other programs are offered."""
    gr = _gradio()
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
    )  # fmt: skip
    for each in (parts["upload"], parts["edited"]):
        each.async_move_resource_to_block_cache = _only_uploads(each.async_move_resource_to_block_cache)
    _tie_calls(page, site, parts, at_once, quick)


def _only_uploads(move: Callable[[str], Awaitable[str]]) -> Callable[[str], Awaitable[str]]:
    """How Gradio takes a visitor's file, but for files that are named by an address, which it would fetch."""

    async def take(path: str) -> str:
        if "://" in str(path):
            raise _gradio().Error("the page fetches no file by its address; upload it", title=_REFUSED, print_exception=False)
        return await move(path)

    return take


def _tie_calls(page: Any, site: Site, parts: _Parts, at_once: int, quick: dict[str, Any]) -> None:
    gr = _gradio()
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
        """Whatever happened: also where Gradio turned the call away, so that nothing began."""
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


def _updates(gr: Any, parts: _Parts, view: View) -> dict[Any, Any]:
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
            raise _gradio().Error(escape(site.said(error), quote=False), title=_REFUSED, print_exception=False) from None

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
    """What changes with the bundle: the way from quality to speed, plans, sizes, guidance; an uploaded plan is let go."""
    manifest, at = site.pipeline(bundle).manifest, site.first_rung(bundle)
    sizes = size_names(manifest)
    return (
        gr.update(maximum=max(1, len(site.rungs[bundle]) - 1), value=at),
        gr.update(choices=site.plan_names(bundle), value=site.plan_at(bundle, at)),
        gr.update(choices=sizes, value=sizes[0]),
        gr.update(value=manifest.guidance_scale),
        None,
    )
