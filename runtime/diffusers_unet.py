"""A bundle's UNet, run by a plan, instead of a diffusers pipeline's own."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from engines import DTYPES, UserError
from engines.bundle.names import TEXT
from engines.bundle.shapes import is_multiple
from runtime.api import load
from runtime.arguments.values import tensor_fault
from runtime.errors import RequestError
from runtime.execution.executor import Executor, StepRecord
from runtime.images.schedulers import make_scheduler
from runtime.plans.notes import Call, plan_notes
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.process import check_not_forked
from runtime.text.chunks import described_tokens, tokens_taken

__all__ = ["Prediction", "UNet"]


class Prediction(NamedTuple):
    """The prediction (rows, channels, height, width), named as in the output of diffusers' UNet."""

    sample: Tensor


@dataclass
class _Call:
    """One denoising loop: the scheduler's timesteps, the number of the first that ran, and of the one to run next.

    Holding on to the timesteps keeps the next call's from being put at the same address.
    """

    timesteps: Tensor
    first: int
    shape: torch.Size
    executor: Executor
    plan: Plan
    stream: "torch.cuda.Stream | None"
    next: int
    records: list[StepRecord] = field(default_factory=list)


def _tell_diffusers() -> None:
    """Have pipelines, where there are any, ask this UNet to be saved: of classes that they do not know they save nothing.

    Pipelines that others are made from (``from_pipe``) know nothing of what this one was attached to.
    """
    loading = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    if loading is not None:
        loading.LOADABLE_CLASSES.setdefault(__name__, {UNet.__name__: ["save_pretrained", "from_pretrained"]})


class UNet:
    """Stands in for the UNet of diffusers' StableDiffusionPipeline, StableDiffusionImg2ImgPipeline and
    StableDiffusionInpaintPipeline, and gives the same latents as ``generate``::

        pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
        pipe.unet = runtime.UNet("bundles/emoji-original", "deepcache:3")

    (With ``unet=None`` diffusers loads no UNet of its own, but text to image must then be given ``height`` and ``width``.)

    Nobody tells a UNet that a call begins, how many evaluations it will have, or which of them this is; a plan needs all three.
    They are read from the timestep: a pipeline walks over ``scheduler.timesteps``, so that what it hands over is a view into the
    memory of that tensor. The offset is the evaluation's number, also where timesteps repeat and where image-to-image leaves the
    first ones out; the length tells how many there are; and since ``set_timesteps`` makes a new tensor for each call, another
    address means another call, whatever became of the one before. Nothing is inherited from one call to the next.

    A loop of your own does the same: ``scheduler.set_timesteps(n)``, then ``for t in scheduler.timesteps``. A change of the
    number of rows or of the size (guidance that is turned off on the way) begins anew with the evaluations that are left.

    A copy of a timestep (``t.repeat(2)``, ``t.to(torch.float32)``) tells its value and nothing else. With the ``scheduler``
    known, its number is found by that value; without, each copy is a call of one evaluation: right, nothing saved, and warned of.

    An object serves one denoising loop at a time; objects on the same bundle share its loaded engines.

    Args:
        bundle: a bundle's folder; None for the one in ``./bundles`` that was built last.
        plan: a preset such as ``deepcache:3``, a JSON file, or a ``Plan``.
        engine: what runs the segments.
        scheduler: whose timesteps are walked over, or a function that gives it; needed only for copied timesteps.
        guided: tells whether a call has classifier-free guidance, negative prompts' rows first, which a plan with ``guidance``
            has to know. Without it, a call is taken to have guidance if both halves of its first sample are alike.
        guidance_scale: tells a call's scale, as far as it is known: a plan that was found for another one is warned of.

    Raises:
        PlanError: a plan that is unknown or malformed. Whether the bundle can run it is checked as a call begins.
        BundleError: no bundle, or a damaged one.
        EngineError: an unknown engine, or one that is not installed or not in the bundle.
    """

    training = False

    def __init__(
        self,
        bundle: str | Path | None = None,
        plan: str | Path | Plan = "full",
        engine: str = "onnxruntime",
        scheduler: Any = None,
        guided: Callable[[], bool | None] = lambda: None,
        guidance_scale: Callable[[], float | None] = lambda: None,
    ) -> None:
        _tell_diffusers()
        self._plan = find_plan(plan)
        self.pipeline = load(bundle, engine, self._plan)
        self._scheduler: Callable[[], Any] = scheduler if callable(scheduler) else lambda: scheduler
        self._guided, self._guidance_scale = guided, guidance_scale
        self._call: _Call | None = None
        self._single: float | None = None
        self._warned = False

    if not TYPE_CHECKING:  # for whom it would have every attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Say of what diffusers' own UNets have beside this, why it has not."""
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(
                f"the UNet of a bundle has no {name}: its weights are inside of compiled engines, and nothing can be loaded into "
                "them or changed. Leave the option out, or use the pipeline's own UNet (.disable() what was attached); LoRAs are "
                "fused when a bundle is built (build --lora FILE)"
            )

    @property
    def plan(self) -> Plan:
        """The plan of the calls to come; a preset or a file can be assigned, and a call that has begun keeps its own."""
        return self._plan

    @plan.setter
    def plan(self, plan: str | Path | Plan) -> None:
        self._plan = find_plan(plan)

    @cached_property
    def config(self) -> Any:
        """The part of a UNet's configuration that pipelines read, as diffusers has it: by key or by attribute."""
        from diffusers.configuration_utils import FrozenDict

        _tell_diffusers()
        manifest = self.pipeline.manifest
        absent = ("time_cond_proj_dim", "addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds")
        return FrozenDict(
            _diffusers_version=manifest.made_with.get("diffusers", "0"),
            in_channels=manifest.latent_channels,
            out_channels=manifest.latent_channels,
            sample_size=min(manifest.sizes[0]) // manifest.vae_scale,
            cross_attention_dim=manifest.features[TEXT].shape[-1],
            center_input_sample=False,
            **dict.fromkeys(absent),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the text features that the engines take. Others are converted, and predictions have the dtype of the sample."""
        return DTYPES[self.pipeline.manifest.features[TEXT].dtype]

    @property
    def device(self) -> torch.device:
        """Where the engines are. Tensors elsewhere are moved there and back."""
        return self.pipeline.engine.device

    @property
    def last_plan(self) -> Plan:
        """The plan of the last call, or of the first to come."""
        return self._call.plan if self._call else self._plan

    def save_pretrained(self, *args: object, **options: object) -> NoReturn:
        """Raise RequestError: diffusers calls it where a pipeline with this UNet is saved, and would else leave the UNet out."""
        raise RequestError(
            "the UNet of a bundle cannot be saved with a pipeline, for its weights are inside of compiled engines; save the "
            "pipeline that it was attached to, or give this one that pipeline's own UNet first (attach returned it as .original)"
        )

    def to(self, *args: object, **kwargs: object) -> "UNet":
        """The object itself, as its engines stay where and as they are; so do ``eval``, ``requires_grad_`` and the like."""
        return self

    eval = train = requires_grad_ = to

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """One parameter without elements, whose dtype and device are those of the UNet: its weights are inside of its engines."""
        yield nn.Parameter(torch.empty(0, dtype=self.dtype, device=self.device), requires_grad=False)

    @property
    def steps(self) -> list[StepRecord]:
        """The segments that ran, and the features inherited, at each evaluation of the last call."""
        return list(self._call.records) if self._call else []

    def __call__(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        *,
        return_dict: bool = True,
        **conditions: object,
    ) -> Prediction | tuple[Tensor]:
        """Predict the noise (or velocity) of one step.

        Args:
            sample: (rows, channels, height, width), scaled for the model.
            timestep: an element of ``scheduler.timesteps``, as an iteration over it gives them.
            encoder_hidden_states: text features (rows, tokens, width); of a long prompt, those of its chunks one after another.
            return_dict: whether to return a ``Prediction`` or a plain tuple.
            conditions: what else diffusers' UNets take; None for each.

        Raises:
            RequestError: a shape that the bundle does not take, a condition that is not None, a timestep that is a number, or one
                that is out of turn.
            PlanError: the bundle's segments cannot run the plan.
        """
        given = [name for name, value in conditions.items() if value is not None]
        if given:
            raise RequestError(f"the UNet of a bundle does not take {', '.join(given)}; leave it out, or use diffusers' own UNet")
        check_not_forked()
        self._check_inputs(sample, encoder_hidden_states)
        call, index = self._turn(sample, timestep)
        device, streams = self.device, self.pipeline.streams
        with self.pipeline.engine.flushing(at_end=call.next + 1 == len(call.timesteps)):
            with streams.use(call.stream):
                prediction, record = call.executor.step(
                    index,
                    sample.to(device, torch.float32),
                    timestep.reshape(-1)[:1].to(device, torch.float32),
                    encoder_hidden_states.to(device, self.dtype),
                )
                prediction = prediction.to(sample.device, sample.dtype)
                if call.stream is not None:
                    streams.hand_over(prediction)
            call.records.append(record)
            call.next += 1
        return Prediction(prediction) if return_dict else (prediction,)

    def _check_inputs(self, sample: Tensor, text: Tensor) -> None:
        """Raise RequestError unless latents and text features have a shape that the bundle takes."""
        manifest = self.pipeline.manifest
        for name, tensor in (("sample", sample), ("encoder_hidden_states", text)):
            if fault := tensor_fault(tensor, numbers=False):
                raise RequestError(f"{name} {fault}; give a tensor of floating-point numbers")
        multiple = manifest.size_multiple // manifest.vae_scale
        shape = tuple(sample.shape)
        if not (len(shape) == 4 and shape[0] and shape[1] == manifest.latent_channels and is_multiple(shape[2:], multiple)):
            raise RequestError(
                f"sample has shape {shape}; expected (rows, {manifest.latent_channels}, height, width) with height and width of "
                f"latents in multiples of {multiple} (pictures in multiples of {manifest.size_multiple} pixels)"
            )
        least, most = tokens_taken([manifest], self.pipeline.engine)
        rows, width = shape[0], manifest.features[TEXT].shape[-1]
        fits = text.ndim == 3 and (text.shape[0], text.shape[2]) == (rows, width)
        if not fits or text.shape[1] < least or text.shape[1] > (most or text.shape[1]):
            expected = f"({rows}, {described_tokens(least, most)}, {width})"
            raise RequestError(
                f"encoder_hidden_states has shape {tuple(text.shape)}; expected {expected}: a row for each of sample's, and "
                f"{manifest.text_length} tokens, or chunks of so many, as this bundle's text encoder gives them"
            )

    def _turn(self, sample: Tensor, timestep: Tensor) -> tuple[_Call, int]:
        """The call that an evaluation belongs to, and the evaluation's number in it."""
        timesteps, index, counted = self._position(timestep)
        call, shape = self._call, sample.shape
        if call is None or not _is_of(call, timesteps, shape) or _again(call, index) or (counted and index != call.next):
            self._end()
            guided = self._is_guided(sample)
            schedule = self.pipeline.schedule(self.plan, timesteps[index:].tolist(), guided)
            self.pipeline.warn_of(plan_notes(self.plan, schedule, self._described(timesteps, guided)), stacklevel=4)
            executor, stream = self.pipeline.executor(schedule), self.pipeline.streams.take()
            call = self._call = _Call(timesteps, index, shape, executor, self.plan, stream, next=index)
        elif index != call.next:
            raise RequestError(
                f"evaluation {index} of {len(timesteps)} (timestep {float(timesteps[index]):g}) is out of turn, expected number "
                f"{call.next}: a plan counts one evaluation for each of scheduler.timesteps, in their order; "
                "call scheduler.set_timesteps before each loop"
            )
        return call, index - call.first

    def _described(self, timesteps: Tensor, guided: bool) -> Call:
        """The call as far as it can be known: without its scheduler, how often the UNet is evaluated."""
        scheduler, scale = self._scheduler(), self._guidance_scale()
        walked = getattr(scheduler, "timesteps", None)
        if isinstance(walked, Tensor) and walked.data_ptr() == timesteps.data_ptr():
            steps = getattr(scheduler, "num_inference_steps", None) or len(timesteps)
            return Call(type(scheduler).__name__, steps, scale, guided)
        return Call("", self._steps_of(len(timesteps)), scale, guided)

    def _steps_of(self, evaluations: int) -> int:
        """So many, or the steps that the plan was found for, where its scheduler evaluates so often in them.

        0 where nothing is known: of timesteps that are copies, there is one at a time.
        """
        found = self.plan.found
        if found is None or evaluations == 1:
            return 0
        try:
            own = make_scheduler(found.scheduler, self.pipeline.bundle.folder / "scheduler", found.steps)
        except UserError:  # of a plan file that was written by hand
            return evaluations
        return found.steps if len(own.timesteps) == evaluations else evaluations

    def _is_guided(self, sample: Tensor) -> bool:
        """Whether a call has guidance, as far as it matters; if nobody says, it has if the halves of its sample are alike."""
        if self.plan.guidance is None or len(sample) % 2:
            return False
        said = self._guided()
        return torch.equal(*sample.chunk(2)) if said is None else said

    def close(self) -> None:
        """Let go of what the last call keeps, where it broke off before its last step; the next call begins anew either way."""
        self._end()

    def _end(self) -> None:
        """Let the last call go: what it keeps, its stream, and what it has compiled if it broke off before its last step."""
        if self._call is not None:
            call, self._call = self._call, None
            call.executor.close()
            self.pipeline.streams.give_back(call.stream)
            if call.next < len(call.timesteps):
                self.pipeline.engine.flush()

    def _position(self, timestep: Tensor) -> tuple[Tensor, int, bool]:
        """All timesteps of the call, the number of this one among them, and whether it was found by its value."""
        timesteps, index = _all_timesteps(timestep)
        if len(timesteps) > timestep.numel():
            return timesteps, index, False
        value = float(timestep.reshape(-1)[0])
        if not math.isfinite(value):
            raise RequestError(f"timestep is {value}; give an element of scheduler.timesteps, which tells the step's number")
        walked = getattr(self._scheduler(), "timesteps", None)
        if isinstance(walked, Tensor) and (found := self._number(walked, timestep)) is not None:
            return walked.detach(), found, True
        if self._single not in (None, value) and not self._warned and not (isinstance(walked, Tensor) and len(walked) == 1):
            self._warned = True
            warnings.warn(
                f"timestep {value:g} is a copy, which does not tell its number among scheduler.timesteps, so every step computes "
                "everything; hand over the elements of scheduler.timesteps themselves, or give runtime.UNet the scheduler",
                stacklevel=4,
            )
        self._single = value
        return timesteps[:1], 0, False

    def _number(self, walked: Tensor, timestep: Tensor) -> int | None:
        """The number of a timestep by its value, None where none has it: the next, or the first from the scheduler's begin."""
        value = timestep.detach().reshape(-1)[0].double().cpu()
        tolerance = 1e-6 + float(value) * (torch.finfo(timestep.dtype).eps if timestep.is_floating_point() else 0)
        alike = ((walked.detach().double().cpu() - value).abs() <= tolerance).tolist()
        call = self._call
        if call is not None and call.timesteps.data_ptr() == walked.data_ptr() and call.next < len(alike) and alike[call.next]:
            return call.next
        begin = getattr(self._scheduler(), "begin_index", None) or 0
        return next((number for number in range(begin, len(alike)) if alike[number]), None)


def _is_of(call: _Call, timesteps: Tensor, shape: torch.Size) -> bool:
    return call.timesteps.data_ptr() == timesteps.data_ptr() and call.shape == shape


def _again(call: _Call, index: int) -> bool:
    """Whether a loop runs over the same timesteps once more: it is where it began, or went back further than one step."""
    return index == call.first != call.next or index < call.next - 1


def _all_timesteps(timestep: Tensor) -> tuple[Tensor, int]:
    """All timesteps in the memory that a timestep is a view of, and its number among them."""
    if not isinstance(timestep, Tensor):
        raise RequestError(
            f"timestep is a {type(timestep).__name__}; give an element of scheduler.timesteps, which tells the step's number"
        )
    if not timestep.numel() or timestep.is_complex() or timestep.is_meta:
        raise RequestError(
            f"timestep is {timestep!r:.100}; give an element of scheduler.timesteps, which tells the step's number"
        )
    if timestep.numel() > 1 and bool((timestep != timestep.reshape(-1)[0]).any()):
        raise RequestError("timestep has unlike values; a plan takes one timestep for all rows")
    count = timestep.untyped_storage().nbytes() // timestep.element_size()
    return timestep.detach().as_strided((count,), (1,), 0), int(timestep.storage_offset())
