"""The page's parts and where they stand. Gradio is imported when a page is made, and nothing but this and ``app`` knows of it."""

import os
from dataclasses import dataclass
from html import escape
from typing import Any

from engines.support.extras import need
from runtime.embedded import EXAMPLES
from runtime.images.schedulers import SCHEDULERS
from serving.errors import ServingError
from serving.page.asked import MOST_STEPS, size_names
from serving.page.site import Site
from serving.page.views import status

__all__ = ["Parts", "gradio", "lay_out"]


def gradio() -> Any:
    """Gradio, which is told not to phone home before it is imported."""
    need("gradio", "the page", "serve", ServingError)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as found

    return found


@dataclass(frozen=True)
class Parts:
    """The page's components, by name."""

    by_name: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.by_name[name]

    def all(self, names: tuple[str, ...]) -> list[Any]:
        return [self.by_name[name] for name in names]


def lay_out(site: Site) -> Parts:
    """Place all parts; inside of the blocks that they belong to."""
    gr = gradio()
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
    return Parts(made)


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
            EXAMPLES.get(source, ""),
            label="prompt",
            placeholder=EXAMPLES.get(source, "what the picture shows"),
            lines=2,
            max_lines=6,
            elem_id="prompt",
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
    """Controls that most visitors leave as they are."""
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
            made["command"] = gr.Code("", language="shell", elem_id="command", **text)
        made["files"] = gr.File(label="what they read", visible=False, file_count="multiple", elem_id="files")
    return made
