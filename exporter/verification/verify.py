"""Compare every segment of a bundle, and the whole chain, with the torch model that it was made from.

The reference is the diffusers UNet itself, run in one piece with hooks that keep what each module made; it shares neither the
topology nor the partition with what is compared. Each segment is fed the reference's features, so that errors do not add up;
the chain is fed its own, and over denoising steps its own latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from engines import DTYPES, Bundle, Engine
from engines.bundle.names import IMAGE, LATENTS, NOISE, SAMPLE, TEXT, TIMESTEP, TOKENS, VAE_DECODER, VAE_ENCODER
from exporter.errors import BuildError
from exporter.graph.graph import check_size
from exporter.graph.text_vae import TextEncoder
from exporter.verification.features import kept_features
from exporter.verification.inputs import counts_to_compare, images_at_a_time, random_inputs, run_in_parts, sizes_to_compare
from exporter.verification.metrics import cosine, psnr, relative_error
from runtime.execution.executor import LoadedBundle
from runtime.images.schedulers import make_scheduler
from runtime.text.tokenizer import load_tokenizer
from tuning.checkpoints.part_loaders import is_tiny

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from exporter.graph.checkpoint import Checkpoint

__all__ = [
    "CHAIN",
    "LARGEST_FP16",
    "LEAST_COSINE",
    "LEAST_PSNR",
    "TOLERANCE",
    "Comparison",
    "Peak",
    "Reference",
    "compare_latents",
    "verify",
]

TOLERANCE: dict[str, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2, "openvino-bf16": 8e-2}
"""Largest allowed error relative to the maximum of the reference, which is float32. bfloat16 has three bits less than float16.

By the precision that a segment was built in, or the name of an engine that computes in another. Of that single numbers of a VAE's
decoder are off by 6e-2, all of whose layers round to bfloat16; that the graph is the right one is then seen by the cosine.
"""
LEAST_COSINE: dict[str, float] = {"fp32": 0.9999, "fp16": 0.9999, "bf16": 0.999, "openvino-bf16": 0.9995}
"""Of a segment's outputs with the reference's, taken as vectors."""
LARGEST_FP16 = 65504.0
"""The largest number of half precision; beyond it is infinity."""
LEAST_PSNR = 35.0
"""Of final latents, in decibels."""
CHAIN = "the chain"
"""Name for all segments of the UNet run together, given nothing but the UNet's inputs."""


class Peak(NamedTuple):
    """The largest number that a module makes, and the module's name."""

    value: float
    module: str


@dataclass(frozen=True)
class Comparison:
    """One segment (or the chain) at one size. ``precision`` is a key of ``TOLERANCE``.

    ``error`` is the largest of its outputs, relative to the reference's maximum, ``cosine`` the least with the reference's.
    ``peak`` is the largest number inside a half of the VAE, as the reference computes it, and the module that makes it: an
    engine on a CPU may compute in more bits than the bundle asks for, and then its outputs do not tell of an overflow.
    """

    segment: str
    images: int
    height: int
    width: int
    precision: str
    error: float
    cosine: float
    peak: Peak | None = None

    @property
    def is_near(self) -> bool:
        """Whether its outputs are as exact as its precision has to be."""
        return self.error <= TOLERANCE[self.precision] and self.cosine >= LEAST_COSINE[self.precision]

    @property
    def overflows(self) -> bool:
        """Whether numbers inside are too large for its precision."""
        return self.precision == "fp16" and self.peak is not None and self.peak.value > LARGEST_FP16

    @property
    def is_good(self) -> bool:
        """Both."""
        return self.is_near and not self.overflows


@dataclass(frozen=True)
class Reference:
    """The torch model in float32, and what its modules make of given inputs."""

    unet: nn.Module
    text: nn.Module
    vae: "AutoencoderKL"
    peaks: dict[str, Peak] = field(default_factory=dict)
    """Of each half of the VAE, at the last call of ``features``."""

    @classmethod
    def load(cls, bundle: Bundle) -> "Reference":
        """The model that a bundle was made from; raises as ``verify`` does, also where its tokenizer or scheduler is another."""
        from exporter.graph.checkpoint import open_source
        from tuning.loras.lora import Lora

        manifest = bundle.manifest
        unet, config, recipe = (
            None if path is None else Path(path) for path in (manifest.unet, manifest.config, manifest.recipe)
        )
        loras = [Lora(Path(lora.file), lora.scale) for lora in manifest.loras]
        checkpoint = open_source(
            manifest.source, manifest.variant, unet, config, manifest.variant_files, recipe, loras, manifest.vae
        )
        if checkpoint.fingerprint(manifest.variant) != manifest.source_sha256:
            raise BuildError(
                f"the weights of source {manifest.source} are not those that bundle {bundle.folder} was made from; "
                "build it anew with --force, then verify it"
            )
        _check_settings(bundle, checkpoint)
        whole = checkpoint.text_encoder()
        text = _SkippingText(whole, manifest.clip_skip) if manifest.clip_skip else TextEncoder(whole)
        return cls(checkpoint.unet(manifest.variant).eval(), text.eval(), checkpoint.vae().eval())

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every feature by name.

        Args:
            inputs: ``tokens`` (rows, text length), ``sample`` (rows, channels, height, width), ``timestep`` (1,), ``latents`` and
                ``image`` for the VAE: (images, channels, height, width) in latents and in pixels.
        """
        features = dict(inputs)
        with torch.no_grad():
            features[TEXT] = self.text(inputs[TOKENS])
            with kept_features(self.unet, features):
                self.unet(inputs[SAMPLE], inputs[TIMESTEP], features[TEXT])
            return features | self._vae_features(inputs)

    def _vae_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scaling = self.vae.config.scaling_factor
        with self._watched(VAE_ENCODER):
            encoded = self.vae.encode(inputs[IMAGE])
        with self._watched(VAE_DECODER):
            picture = self.vae.decode(inputs[LATENTS] / scaling).sample
        latents = encoded.latents if is_tiny(self.vae) else torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        return {VAE_DECODER: picture, VAE_ENCODER: latents * scaling}

    @contextmanager
    def _watched(self, half: str) -> Iterator[None]:
        """Note the largest number that a module of the VAE makes meanwhile."""
        found = [Peak(0.0, "")]

        def hook(name: str) -> Callable[[nn.Module, object, object], None]:
            def look(module: nn.Module, args: object, output: object) -> None:
                if isinstance(output, Tensor):
                    found.append(max(found.pop(), Peak(float(output.abs().max()), name), key=lambda peak: peak.value))

            return look

        hooks = [module.register_forward_hook(hook(name)) for name, module in self.vae.named_modules() if name]
        try:
            yield
        finally:
            for entry in hooks:
                entry.remove()
        self.peaks[half] = found[0]


def _check_settings(bundle: Bundle, checkpoint: "Checkpoint") -> None:
    """Raise BuildError or BundleError unless tokenizer and scheduler are the source's, and the tokenizer works."""
    ours = {file.path: file.sha256 for file in bundle.manifest.files}
    theirs = {name: sha256(content).hexdigest() for name, content in checkpoint.settings().items()}
    if unlike := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise BuildError(
            f"{unlike[0]} of bundle {bundle.folder} is not that of its source {bundle.manifest.source}; "
            "build it anew with --force, then verify it"
        )
    load_tokenizer(bundle)


class _SkippingText(nn.Module):
    """A whole text encoder whose last layers count for nothing: hidden states of an earlier one, and the final norm."""

    def __init__(self, model: nn.Module, clip_skip: int) -> None:
        super().__init__()
        self.model, self._at = model, -(clip_skip + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model(input_ids=tokens, output_hidden_states=True).hidden_states[self._at]
        inside: Any = getattr(self.model, "text_model", self.model)
        result: Tensor = inside.final_layer_norm(hidden)
        return result


def verify(
    bundle: Bundle, engine: Engine, sizes: Sequence[tuple[int, int]] = (), reference: Reference | None = None
) -> Iterator[Comparison]:
    """Compare all segments and the chain with the torch model on random inputs, for each size and two numbers of images.

    Args:
        bundle: what to verify.
        engine: what runs its segments.
        sizes: picture sizes (height, width) in pixels; by default the bundle's first and one other.
        reference: its source's model, by default loaded here.

    Raises:
        SourceError: the bundle's source cannot be found any more.
        BuildError: the source's weights, tokenizer or scheduler are others than the bundle's, or a size is none that the UNet
            takes.
        BundleError: the tokenizer does not work.
        EngineError: there is no device for the engine here, or it cannot run the bundle.
    """
    engine.check_device()
    manifest = bundle.manifest
    for size in sizes:
        check_size(size, manifest.size_multiple)
    reference = reference or Reference.load(bundle)
    network = LoadedBundle.load(bundle, engine)
    with engine.flushing():
        for height, width in sizes or sizes_to_compare(manifest, engine):
            for images in counts_to_compare(manifest, engine):
                inputs = random_inputs(manifest, engine, images, height, width)
                features = reference.features(inputs)
                for segment, error, angle in _errors(network, engine, inputs, features):
                    built = manifest.precision if segment == CHAIN else manifest.precision_of(manifest.segment(segment))
                    precision = engine.name if engine.computes_in else built
                    peak = reference.peaks.get(segment)
                    yield Comparison(segment, images, height, width, precision, error, angle, peak)


def compare_latents(
    bundle: Bundle, engine: Engine, size: tuple[int, int], steps: int, reference: Reference | None = None
) -> float:
    """PSNR in decibels of the latents that the chain comes to by DDIM steps from the same noise and text as the torch model.

    Args:
        bundle: what to verify.
        engine: what runs its segments.
        size: picture height and width in pixels.
        steps: how many.
        reference: its source's model, by default loaded here.

    Raises:
        SourceError, BuildError: as ``verify``.
    """
    reference = reference or Reference.load(bundle)
    network = LoadedBundle.load(bundle, engine)
    inputs = random_inputs(bundle.manifest, engine, counts_to_compare(bundle.manifest, engine)[0], *size)
    with torch.no_grad():
        text = reference.text(inputs[TOKENS])

    def chain(sample: Tensor, timestep: Tensor) -> Tensor:
        given = {SAMPLE: sample, TIMESTEP: timestep, TOKENS: inputs[TOKENS]}
        return network.compute(NOISE, {name: tensor.to(engine.device) for name, tensor in given.items()}).cpu()

    def whole(sample: Tensor, timestep: Tensor) -> Tensor:
        return reference.unet(sample, timestep, text).sample  # type: ignore[no-any-return]

    with engine.flushing():
        made, wanted = (_denoised(bundle, predict, inputs[SAMPLE], steps) for predict in (chain, whole))
    return psnr(made, wanted)


@torch.no_grad()
def _denoised(bundle: Bundle, predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, steps: int) -> Tensor:
    scheduler = make_scheduler("ddim", bundle.folder / "scheduler", steps)
    for timestep in scheduler.timesteps:
        prediction = predict(latents, timestep.float()[None])
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def _errors(
    network: LoadedBundle, engine: Engine, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    manifest = network.manifest
    known = {name: tensor for name, tensor in features.items() if name in manifest.features}  # parts of attention often are not
    on_device = {name: tensor.to(engine.device, DTYPES[manifest.features[name].dtype]) for name, tensor in known.items()}
    for segment in manifest.segments:
        part = images_at_a_time(manifest, engine, segment)
        made = run_in_parts(network.runners[segment.name], on_device, part)
        pairs = [(made[name], features[name]) for name in segment.outputs]
        yield segment.name, max(relative_error(*pair) for pair in pairs), min(cosine(*pair) for pair in pairs)
    given = {name: on_device[name] for name in inputs}
    noise = network.compute(NOISE, given), features[NOISE]
    yield CHAIN, relative_error(*noise), cosine(*noise)
