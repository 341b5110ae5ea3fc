"""Text to image and image to image: a bundle and a prompt in, pictures out."""

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from copy import copy
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from engines import Bundle, Engine, Manifest
from engines.bundle.names import IMAGE, LATENTS, TEXT, TOKENS, VAE, VAE_DECODER, VAE_ENCODER
from engines.cuda.streams import CallStreams
from runtime.advice import add_precision_advice, build_advice
from runtime.arguments.aliases import with_our_names
from runtime.arguments.callbacks import StepEnd, checked_callback, diffusers_callback
from runtime.errors import NonFiniteError, PlanError, RequestError
from runtime.execution.denoising import Callback, denoise
from runtime.execution.executor import Executor, StepRecord
from runtime.execution.graph_cache import CudaGraphCache
from runtime.execution.nonfinite import NonFinite, is_finite, watched
from runtime.execution.siblings import check_among, find_sibling
from runtime.execution.swapping import Swapper, free_bytes
from runtime.generation import Generation
from runtime.images.initial_latents import (
    InitialState,
    from_latents,
    from_noise,
    from_picture,
    generators_of,
    timesteps_from,
)
from runtime.images.pictures import Original, read_original, to_pictures
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.images.schedulers import make_scheduler, read_spaces, read_train_steps
from runtime.plans.checks import check_runs
from runtime.plans.notes import plan_notes
from runtime.plans.plan import Plan
from runtime.plans.schedule import Schedule
from runtime.prepared import Prepared, check_clip_skip, check_shape, check_tensors, latent_shape, sizes_of
from runtime.process import check_not_forked, note_loaded, plain_settings
from runtime.report.memory import check_memory
from runtime.request import FIELDS, Request
from runtime.text.chunks import tokens_taken
from runtime.text.encoding import Prompts
from runtime.text.tokenizer import load_tokenizer

__all__ = ["Callback", "Pipeline"]

CALLBACK = "a callback"
"""Its name among what can make numbers that are not finite."""


class Pipeline:
    """A loaded bundle. Calls share it and keep their own state, so they may run in parallel.

    Args:
        bundle: what to load.
        engine: what runs it.
        free: tells how much memory of a device is free; UNets that do not fit into it together are swapped.
        siblings: the bundles whose UNets plans may switch to; None for all that lie beside the bundle.

    Raises:
        BundleError, EngineError: as ``Engine.load``.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        free: Callable[[torch.device], int | None] = free_bytes,
        siblings: Sequence[Bundle] | None = None,
    ) -> None:
        note_loaded()
        engine.check_device()
        bundle.check_complete()
        self.bundle, self.engine, self.siblings = bundle, engine, siblings
        if bundle.manifest.is_random:
            warnings.warn(
                f"{bundle.folder} has random weights ({bundle.manifest.source}), so its pictures are noise", stacklevel=2
            )
        self.tokenizer: Any = load_tokenizer(bundle)
        recorder = engine.recorder()
        self.graphs = CudaGraphCache(recorder) if recorder else None
        self.swapper = Swapper(bundle, engine, self.graphs, free)
        self.networks = self.swapper.networks
        self.network = self.networks[bundle.manifest.variant]
        self._prompts = Prompts(self.manifest, self.tokenizer, engine)
        self.streams = CallStreams(engine.device)
        self._warned: set[str] = set()
        self._train_steps = read_train_steps(bundle.folder / "scheduler")

    def with_siblings(self, siblings: Sequence[Bundle]) -> "Pipeline":
        """The same loaded bundle, for calls whose plans may switch to the UNets of these bundles and to no others."""
        found = copy(self)
        found.siblings = tuple(siblings)
        return found

    @property
    def manifest(self) -> Manifest:
        """The bundle's description of itself."""
        return self.bundle.manifest

    @property
    def is_static(self) -> bool:
        """Whether its engines take one size and one number of rows only."""
        return self.engine.has_profile and self.manifest.static

    def schedule(self, plan: Plan, timesteps: Sequence[float], guided: bool = False) -> Schedule:
        """A plan laid out for this bundle (and others of its source, where the plan switches UNets), checked.

        Args:
            plan: what to lay out.
            timesteps: of each model evaluation, falling.
            guided: whether there is classifier-free guidance.

        Raises:
            PlanError: a UNet of the plan is not there, or the segments cannot run the plan, with the command that builds what
                could, as a note; or engines are static and the plan evaluates half of the rows at some steps.
        """
        names = dict.fromkeys(part.unet for part in plan.unets) or [self.manifest.variant]
        with build_advice(plan, self.bundle, self.engine.name, self.swapper.bundle_of):
            for name in names:
                if name not in self.networks:
                    self.swapper.add(find_sibling(self.bundle, name, plan, timesteps, self.siblings))
                elif self.siblings is not None and name != self.manifest.variant:
                    check_among(self.swapper.bundle_of(name), self.siblings)
            unets = {name: self.networks[name].manifest for name in names}
            schedule = Schedule(plan, unets, timesteps, self._train_steps, guided)
            check_runs(schedule)
        if schedule.guided and self.is_static:
            raise PlanError(
                f"plan {plan.name} evaluates half of guidance's rows at some steps, and the {self.engine.name} engines of this "
                f"bundle are static, for {2 * self.manifest.max_images} rows; build it without --static"
            )
        return schedule

    def executor(self, schedule: Schedule) -> Executor:
        """The state of one call that runs a schedule's steps."""
        return Executor(self.networks, schedule, self.graphs, self.swapper, self._spaces_for(schedule))

    def _spaces_for(self, schedule: Schedule) -> PredictionSpaces | None:
        """The meaning of predictions, read when the first plan that carries them asks; None for plans that do not."""
        return self._spaces if schedule.carries_predictions else None

    @cached_property
    def _spaces(self) -> PredictionSpaces:
        return read_spaces(self.bundle.folder / "scheduler")

    def prepare(self, request: Request) -> Prepared:
        """Fit a request to this bundle; nothing runs.

        Raises:
            RequestError: an image or mask that cannot be read or does not fit, or a size, strength or number of steps that cannot
                be had.
            PlanError: as ``schedule``.
        """
        manifest = self.manifest
        original = self._original(request)
        check_clip_skip(self.bundle, self.engine.name, request)
        check_tensors(manifest, request, tokens_taken([manifest], self.engine))
        height, width = self._size(request, original)
        guidance_scale = manifest.guidance_scale if request.guidance_scale is None else request.guidance_scale
        check_shape(manifest, self.engine, request.images, height, width, guidance_scale)
        sizes = sizes_of(manifest, request.images, height, width, guidance_scale)
        check_memory(manifest, self.engine.device, sizes)
        inpainting = original is not None and original.mask is not None
        scheduler = make_scheduler(request.scheduler, self.bundle.folder / "scheduler", request.steps, inpainting)
        timesteps = timesteps_from(scheduler, request.steps, request.strength) if original else scheduler.timesteps
        schedule = self.schedule(request.found_plan, timesteps.tolist(), guidance_scale > 1)
        taken = tokens_taken(schedule.unets.values(), self.engine)
        check_tensors(manifest, request, taken)
        sizes["tokens"] = self._prompts.tokens(request, guidance_scale > 1, taken[1])
        check_memory(manifest, self.engine.device, sizes, schedule)
        original = original and original.resized(height, width)
        return Prepared(request, height, width, guidance_scale, sizes, scheduler, timesteps, schedule, original)

    def _size(self, request: Request, original: Original | None) -> tuple[int, int]:
        """Height and width in pixels: those asked for, or the picture's own, or the bundle's first."""
        if original:
            return original.fitting_size(request.height, request.width, self.manifest.size_multiple)
        height, width = self.manifest.sizes[0]
        if request.latents is not None:
            height, width = (int(side) * self.manifest.vae_scale for side in request.latents.shape[2:])
            if (request.height or height, request.width or width) != (height, width):
                raise RequestError(
                    f"size {request.height or height}x{request.width or width} and latents of {height}x{width} pixels are given; "
                    "leave the size out"
                )
        return height if request.height is None else request.height, width if request.width is None else request.width

    def _original(self, request: Request) -> Original | None:
        """The picture to start from, at its own size; None without one."""
        original = read_original(request.image, request.mask)
        if original is None:
            return None
        if VAE_ENCODER not in [segment.name for segment in self.manifest.segments]:
            raise RequestError(
                f"bundle {self.bundle.folder} has no segment {VAE_ENCODER}, which image needs: an older version built it; "
                f"build it anew: {self.bundle.rebuild_command(self.engine.name)}"
            )
        return original

    def generate(
        self,
        prompt: Request | str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        **options: Any,
    ) -> Generation:
        """Generate pictures.

        Args:
            prompt: a ``Request``; or a prompt or several, with the other fields of ``Request`` by name.
            negative_prompt: one, or one for each prompt; not read where ``prompt`` is a ``Request``.
            options: other fields of ``Request``, by our names or diffusers'; ``callback`` and ``callback_on_step_end``.

        Raises:
            As ``runtime.generate``.
        """
        callback = checked_callback("callback", options.pop("callback", None))
        inputs = options.pop("callback_on_step_end_tensor_inputs", None)
        step_end = diffusers_callback(self, options.pop("callback_on_step_end", None), inputs)
        request = self._request(prompt, negative_prompt, options)
        check_not_forked()
        started, again = time.perf_counter(), request.copied()
        with plain_settings():
            prepared = self.prepare(request)
            self._warn(prepared)
            with self.engine.flushing(), self.streams.one():
                text, unread = self._text(prepared)
                start = self._initial_state(prepared)
                latents, records = self._denoise(self.executor(prepared.schedule), prepared, text, start, callback, step_end)
                pixels = None if request.output_type == "latent" else self._pixels(latents)
                if not (is_finite(latents) and (pixels is None or is_finite(pixels))):
                    self._report_nonfinite(again)
                self.streams.hand_over(latents)
            images: Any = latents if pixels is None else self._output(prepared, pixels)
        return Generation(
            images,
            latents,
            records,
            time.perf_counter() - started,
            prepared.schedule.plan,
            request.seeds,
            request,
            self.manifest,
            prepared.guidance_scale,
            unread,
        )

    @staticmethod
    def _request(prompt: Request | str | Sequence[str] | None, negative: Any, options: dict[str, Any]) -> Request:
        return prompt if isinstance(prompt, Request) else Request(prompt, negative, **with_our_names(options, FIELDS))

    def _warn(self, prepared: Prepared) -> None:
        """Warn of a plan that is for other calls, and of a UNet whose pictures suffer, once for each."""
        self.warn_of(plan_notes(prepared.request.found_plan, prepared.schedule, prepared.call), stacklevel=5)
        for name in prepared.schedule.unets:
            if not self.networks[name].manifest.distilled and name not in self._warned:
                self._warned.add(name)
                warnings.warn(
                    f"the {name} UNet of {self.bundle.folder} was cut out of a larger one and never distilled, so its pictures "
                    "suffer; python -m tuning distill teaches it (docs/tuning.md)",
                    stacklevel=4,
                )

    def warn_of(self, notes: Iterable[str], stacklevel: int) -> None:
        """Warn of each note that nobody was warned of yet."""
        for note in set(notes) - self._warned:
            self._warned.add(note)
            warnings.warn(note, stacklevel=stacklevel)

    def _output(self, prepared: Prepared, pixels: Tensor) -> Any:
        """The VAE's pictures in the form of the request's ``output_type``; inpainting keeps what its mask leaves out."""
        if prepared.original is not None:
            pixels = prepared.original.kept_in(pixels)
        kind = prepared.request.output_type
        if kind == "pil":
            return to_pictures(pixels)
        levels = (pixels.nan_to_num(nan=-1.0) / 2 + 0.5).clamp(0, 1)
        return levels if kind == "pt" else levels.permute(0, 2, 3, 1).numpy()

    def can_share(self, request: Request) -> bool:
        """Whether a request's pictures stay the same when pictures of other requests are made in the same call.

        Adaptive plans decide for a whole batch whether features have changed. Static engines take one number of pictures.
        """
        own = (request.image, request.latents, request.generator, request.prompt_embeds, request.negative_prompt_embeds)
        return all(each is None for each in own) and request.found_plan.adaptive is None and not self.is_static

    def reads_whole(self, request: Request) -> bool:
        """Whether the request's prompts are read to their ends, and so are the negative ones, which guidance reads."""
        length, (_, most) = self.manifest.text_length, tokens_taken([self.manifest], self.engine)
        most = length if request.long_prompts == "cut" else most
        texts = [*request.prompts, *request.negative_prompts]
        return most is None or not texts or self._prompts.chunks(texts) * length <= most

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's output (prompts, tokens, width), of the chunks that the longest prompt needs; what the UNet does not
        take is cut off with a warning.
        """
        needed, (_, most) = self._prompts.chunks(prompts), tokens_taken([self.manifest], self.engine)
        chunks = needed if most is None else min(needed, most // self.manifest.text_length)
        return self._prompts.encode(prompts, self._encode_tokens, chunks)[0]

    def _text(self, prepared: Prepared) -> tuple[Tensor, tuple[str, ...]]:
        """Text features of a call (rows, tokens, width), and what was not read of its prompts."""
        return self._prompts.features(prepared.request, prepared.guided, prepared.sizes["tokens"], self._encode_tokens)

    def _encode_tokens(self, tokens: Tensor) -> Tensor:
        return self.network.compute(TEXT, {TOKENS: tokens})

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Pictures from latents (images, channels, height, width)."""
        return to_pictures(self._pixels(latents))

    def _pixels(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels (images, 3, height, width), about in [-1, 1], float32 on the CPU.

        As many pictures at a time as its engines take.
        """
        parts = latents.split(self.manifest.vae_images or len(latents))
        return torch.cat([self.network.compute(VAE_DECODER, {LATENTS: part}).float().cpu() for part in parts])

    def _initial_state(self, prepared: Prepared) -> InitialState:
        request = prepared.request
        generators = request.generators or generators_of(request.picture_seeds)
        original, device = prepared.original, self.engine.device
        if request.latents is not None:
            return from_latents(prepared.scheduler, request.latents, generators, device)
        if original is None:
            shape = latent_shape(self.manifest, prepared.height, prepared.width)
            return from_noise(prepared.scheduler, shape, generators, device)
        distribution = self.network.compute(VAE_ENCODER, {IMAGE: original.pixels().to(device)})
        mask = original.repainted(self.manifest.vae_scale)
        strength, channels = request.strength, self.manifest.latent_channels
        return from_picture(prepared.scheduler, distribution, mask, prepared.timesteps, strength, generators, channels)

    def _denoise(
        self,
        executor: Executor,
        prepared: Prepared,
        text: Tensor,
        start: InitialState,
        callback: Callback | None,
        step_end: StepEnd | None = None,
    ) -> tuple[Tensor, list[StepRecord]]:
        with self.swapper.exclusive(), closing(executor):
            return denoise(executor, prepared, text, start, self.engine.device, callback, step_end)

    def _report_nonfinite(self, request: Request) -> None:
        """Raise NonFiniteError, or with ``allow_nonfinite`` warn; the call runs once more to find where it began."""
        where, segment = self._find_nonfinite(request)
        vae = segment in VAE
        precision = (self.manifest.vae_precision if vae else None) or self.manifest.precision
        error = NonFiniteError(f"{where} gave numbers that are not finite ({precision}): the picture is lost")
        if segment != CALLBACK:
            add_precision_advice(error, self.bundle, self.engine.name, precision, vae=vae)
        if not request.allow_nonfinite:
            raise error
        warnings.warn(error.line, stacklevel=4)

    def _find_nonfinite(self, request: Request) -> tuple[str, str]:
        """Where the first output is that is not finite, in words, and the name of the segment (or of what else) made it."""
        prepared = self.prepare(request)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is to be said of the prompts was said
            text, _ = self._text(prepared)
        if not is_finite(text):
            return f"segment {TEXT}", TEXT
        start, done = self._initial_state(prepared), list[int]()
        # Inpainting of full strength starts from noise alone, and takes the picture's latents after its first step.
        if not (is_finite(start.latents) and (start.repaint is None or is_finite(start.repaint.known))):
            before = "the scheduler, before the first step,"
            return (f"segment {VAE_ENCODER}", VAE_ENCODER) if prepared.original else (before, "the scheduler")

        def look(record: StepRecord, latents: Tensor) -> None:
            if not is_finite(latents):
                raise NonFinite("the scheduler")
            done.append(record.index)

        networks = {name: watched(network) for name, network in self.networks.items()}
        try:
            executor = Executor(networks, prepared.schedule, None, self.swapper, self._spaces_for(prepared.schedule))
            latents, _ = self._denoise(executor, prepared, text, start, look)
        except NonFinite as found:
            part = found.segment if found.segment == "the scheduler" else f"segment {found.segment}"
            return f"step {len(done)} of {prepared.schedule.steps}: {part}", found.segment
        if is_finite(self._pixels(latents)):
            return f"{CALLBACK}, without which all numbers are finite,", CALLBACK
        return f"segment {VAE_DECODER}", VAE_DECODER
