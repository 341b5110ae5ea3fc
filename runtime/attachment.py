"""A bundle's UNet instead of a diffusers pipeline's own, and back."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from runtime.diffusers_unet import UNet
from runtime.errors import RequestError
from runtime.execution.executor import StepRecord
from runtime.images.schedulers import read_prediction_type
from runtime.plans.plan import Plan
from runtime.report.kinds import Kind, kinds_of, segment_counts

__all__ = ["Attachment", "Report", "attach"]


@dataclass(frozen=True)
class Report:
    """The last call: the ``plan``, each evaluation of the UNet (``steps``), and the ``seconds`` they took together."""

    plan: str
    steps: Sequence[StepRecord]
    segments: dict[str, int]
    """Of each UNet, how many segments it has."""

    @property
    def seconds(self) -> float:
        """Of all evaluations; on a GPU, asking waits until they have been done."""
        return sum(record.seconds for record in self.steps)

    @property
    def kinds(self) -> list[Kind]:
        """The evaluations by what they ran."""
        return kinds_of(self.steps)

    def __str__(self) -> str:
        if not self.steps:
            return f"plan {self.plan}: nothing has run yet"
        kinds = [
            f"{kind.count} {kind.name} ({kind.segments(self.segments[kind.unet])}; {kind.milliseconds:.1f} ms each)"
            for kind in self.kinds
        ]
        return f"plan {self.plan}: {len(self.steps)} evaluations of the UNet in {self.seconds:.2f} s: {', '.join(kinds)}"


class Attachment:
    """A bundle's UNet in a diffusers pipeline: ``pipe.unet`` is replaced, and all else of the pipeline is left as it is.

    Every scheduler, callback and option of the pipeline works as before; saved, it has its own UNet. Pipelines made from it
    (``from_pipe``) have the bundle's as well, and are refused to be saved with it. ``disable`` puts the own one back, and
    ``enable`` the bundle's; what is assigned to ``plan`` (a preset, a file, or a ``Plan``) holds from the next call on.
    """

    def __init__(self, pipe: Any, unet: UNet) -> None:
        self.pipe, self.unet, self.original = pipe, unet, pipe.unet
        self.enable()

    @property
    def plan(self) -> Plan:
        """The plan of the calls to come. A preset such as ``deepcache:3``, a JSON file or a ``Plan`` can be assigned."""
        return self.unet.plan

    @plan.setter
    def plan(self, plan: str | Path | Plan) -> None:
        self.unet.plan = plan

    @property
    def enabled(self) -> bool:
        """Whether the pipeline's UNet is the bundle's."""
        return self.pipe.unet is self.unet

    def enable(self) -> None:
        """Put the bundle's UNet into the pipeline."""
        self.pipe.unet = self.unet
        self.pipe.save_pretrained = self._save_pretrained

    def disable(self) -> None:
        """Put the pipeline's own UNet back."""
        self.pipe.unet = self.original
        vars(self.pipe).pop("save_pretrained", None)

    def _save_pretrained(self, *args: Any, **options: Any) -> Any:
        """Save the pipeline as it is without the bundle: diffusers would leave out a UNet that is none of its own."""
        self.disable()
        try:
            return self.pipe.save_pretrained(*args, **options)
        finally:
            self.enable()

    def report(self) -> Report:
        """Which segments the last call with the bundle's UNet ran, and how long it took; printed, it is one line."""
        return Report(self.unet.last_plan.name, self.unet.steps, segment_counts(self.unet.pipeline.networks))

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"<{type(self.pipe).__name__} with {self.unet.pipeline.bundle.folder}, plan {self.plan.name}, {state}>"


def attach(
    pipe: Any, bundle: str | Path | None = None, plan: str | Path | Plan = "full", engine: str = "onnxruntime"
) -> Attachment:
    """Run a diffusers pipeline's UNet as a bundle's, by a plan::

        heirloom = unet_heirloom.attach(pipe, "bundles/emoji-original", plan="deepcache:3")

    Args:
        pipe: a StableDiffusionPipeline, StableDiffusionImg2ImgPipeline or StableDiffusionInpaintPipeline, with the checkpoint
            that the bundle was built from.
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        plan: a preset such as ``deepcache:3``, a JSON file, or a ``Plan``. Whether the bundle can run it is checked as a call
            begins.
        engine: what runs the segments.

    Raises:
        RequestError: the pipeline has no UNet, or one that the bundle's cannot stand in for.
        PlanError: a plan that is unknown or malformed.
        BundleError: no bundle, or a damaged one.
        EngineError: an unknown engine, or one that is not installed or not in the bundle.
    """
    if not hasattr(pipe, "unet") or not hasattr(pipe, "scheduler"):
        raise RequestError(
            f"pipe is a {type(pipe).__name__}, which has no UNet and scheduler; give a pipeline such as StableDiffusionPipeline"
        )
    if isinstance(pipe.unet, UNet):
        raise RequestError("pipe has a bundle's UNet already; assign its .plan, or .disable() the one that was attached first")
    guided = partial(getattr, pipe, "do_classifier_free_guidance", None)
    scale = partial(getattr, pipe, "guidance_scale", None)
    unet = UNet(bundle, plan, engine, scheduler=lambda: pipe.scheduler, guided=guided, guidance_scale=scale)
    _check_alike(pipe.unet, unet)
    for warning in _unlike(pipe, unet):
        warnings.warn(warning, stacklevel=2)
    return Attachment(pipe, unet)


_COMPARED = {
    "in_channels": "channels of latents",
    "out_channels": "channels of predictions",
    "cross_attention_dim": "text width",
}


def _unlike(pipe: Any, unet: UNet) -> Iterator[str]:
    """The settings of a bundle that a pipeline cannot know, as it encodes prompts itself and has a scheduler of its own."""
    folder, manifest = unet.pipeline.bundle.folder, unet.pipeline.manifest
    if loras := ", ".join(lora.option for lora in manifest.loras if lora.scale):
        yield (
            f"{folder} has LoRA {loras} in its UNet; the pipeline's text encoder needs it too, if the LoRA changes that: "
            'pipe.load_lora_weights(FILE), pipe.fuse_lora(components=["text_encoder"], lora_scale=SCALE) before attach'
        )
    if skipped := manifest.clip_skip:
        yield f"{folder} was built with --clip-skip {skipped}: give clip_skip={skipped} to the pipeline's calls"
    theirs = getattr(getattr(pipe.scheduler, "config", None), "prediction_type", None)
    if theirs is not None and theirs != (ours := read_prediction_type(folder / "scheduler")):
        yield f"the pipeline's scheduler is for a UNet that predicts {theirs}, and that of {folder} predicts {ours}"


def _check_alike(own: Any, unet: UNet) -> None:
    """Raise RequestError where the bundle's UNet takes or gives other shapes than the pipeline's own, if it has one."""
    for name, what in _COMPARED.items():
        theirs, ours = getattr(getattr(own, "config", None), name, None), getattr(unet.config, name)
        theirs = theirs[0] if isinstance(theirs, list | tuple) and len(set(theirs)) == 1 else theirs
        if theirs is not None and theirs != ours:
            raise RequestError(
                f"the pipeline's UNet has {what} {theirs}, that of {unet.pipeline.bundle.folder} has {ours}; "
                "build a bundle from the pipeline's own checkpoint"
            )
