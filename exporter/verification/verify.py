"""Compare every segment of a bundle, and the whole chain, with the torch model that it was made from.

The reference is the diffusers UNet itself, run in one piece with hooks that keep what each module made; it shares neither the
topology nor the partition with what is compared. Each segment is fed the reference's features, so that errors do not add up;
the chain is fed its own, and over denoising steps its own latents.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engines import DTYPES, Bundle, Engine
from engines.bundle.manifest import Manifest, Precision
from engines.bundle.names import IMAGE, LATENTS, NOISE, SAMPLE, TEXT, TIME, TIMESTEP, TOKENS, VAE_DECODER, VAE_ENCODER
from engines.bundle.shapes import resolve
from exporter.errors import BuildError
from exporter.graph.graph import check_size
from exporter.graph.text_vae import TextEncoder
from exporter.verification.metrics import cosine, psnr, relative_error
from runtime.execution.executor import LoadedBundle
from runtime.images.schedulers import make_scheduler
from tuning.surgery.units import unit_modules

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

__all__ = ["CHAIN", "LEAST_COSINE", "LEAST_PSNR", "TOLERANCE", "Comparison", "Reference", "compare_latents", "verify"]

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3}
"""Largest allowed error relative to the reference's maximum. The reference is float32 in both cases."""
LEAST_COSINE = 0.9999
"""Of a segment's outputs with the reference's, taken as vectors."""
LEAST_PSNR = 35.0
"""Of final latents, in decibels."""
CHAIN = "the chain"
"""What all segments of the UNet together are called, fed with nothing but the UNet's inputs."""


@dataclass(frozen=True)
class Comparison:
    """One segment (or the chain) at one size.

    ``error`` is the largest of its outputs, relative to the reference's maximum, ``cosine`` the least with the reference's.
    """

    segment: str
    images: int
    height: int
    width: int
    error: float
    cosine: float

    def within(self, precision: Precision) -> bool:
        """Whether it is as exact as a bundle of that precision has to be."""
        return self.error <= TOLERANCE[precision] and self.cosine >= LEAST_COSINE


@dataclass(frozen=True)
class Reference:
    """The torch model in float32, and what its modules make of given inputs."""

    unet: nn.Module
    text: nn.Module
    vae: "AutoencoderKL"

    @classmethod
    def load(cls, bundle: Bundle) -> "Reference":
        """The model that a bundle was made from; raises as ``verify`` does."""
        from exporter.graph.checkpoint import open_source

        manifest = bundle.manifest
        unet, config, recipe = (
            None if path is None else Path(path) for path in (manifest.unet, manifest.config, manifest.recipe)
        )
        checkpoint = open_source(manifest.source, manifest.variant, unet, config, manifest.variant_files, recipe)
        if checkpoint.fingerprint(manifest.variant) != manifest.source_sha256:
            raise BuildError(
                f"the weights of source {manifest.source} are not those that bundle {bundle.folder} was made from; "
                "build it anew with --force, then verify it"
            )
        text = TextEncoder(checkpoint.text_encoder())
        return cls(checkpoint.unet(manifest.variant).eval(), text.eval(), checkpoint.vae().eval())

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every feature by name.

        Args:
            inputs: ``tokens`` (rows, text length), ``sample`` (rows, channels, height, width), ``timestep`` (1,), ``latents`` and
                ``image`` for the VAE: (images, channels, height, width) in latents and in pixels.
        """
        features = dict(inputs)
        paths = {path: name for name, path in unit_modules(self.unet).items()} | {"time_embedding": TIME}
        hooks = [self.unet.get_submodule(path).register_forward_hook(_keep(features, name)) for path, name in paths.items()]
        try:
            with torch.no_grad():
                features[TEXT] = self.text(inputs[TOKENS])
                self.unet(inputs[SAMPLE], inputs[TIMESTEP], features[TEXT])
                features |= self._vae_features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        features[TIME] = features[TIME][:1]  # the UNet repeats the one timestep for every row
        return features

    def _vae_features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scaling = self.vae.config.scaling_factor
        latents = self.vae.encode(inputs[IMAGE]).latent_dist
        return {
            VAE_DECODER: self.vae.decode(inputs[LATENTS] / scaling).sample,
            VAE_ENCODER: torch.cat([latents.mean, latents.std], dim=1) * scaling,
        }


def _keep(features: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, object], None]:
    def hook(module: nn.Module, args: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        assert isinstance(tensor, Tensor)
        features[name] = tensor

    return hook


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
        BuildError: the source's weights are others than the bundle was made from, or a size is none that the UNet takes.
    """
    manifest = bundle.manifest
    for size in sizes:
        check_size(size, manifest.size_multiple)
    reference = reference or Reference.load(bundle)
    network = LoadedBundle.load(bundle, engine)
    for height, width in sizes or _sizes(manifest, engine):
        for images in _counts(manifest, engine):
            inputs = _inputs(manifest, engine, images, height, width)
            features = reference.features(inputs)
            for segment, error, angle in _errors(network, engine, inputs, features):
                yield Comparison(segment, images, height, width, error, angle)


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
    inputs = _inputs(bundle.manifest, engine, _counts(bundle.manifest, engine)[0], *size)
    with torch.no_grad():
        text = reference.text(inputs[TOKENS])

    def chain(sample: Tensor, timestep: Tensor) -> Tensor:
        given = {SAMPLE: sample, TIMESTEP: timestep, TOKENS: inputs[TOKENS]}
        return network.compute(NOISE, {name: tensor.to(engine.device) for name, tensor in given.items()}).cpu()

    def whole(sample: Tensor, timestep: Tensor) -> Tensor:
        return reference.unet(sample, timestep, text).sample  # type: ignore[no-any-return]

    made, wanted = (_denoised(bundle, predict, inputs[SAMPLE], steps) for predict in (chain, whole))
    return psnr(made, wanted)


@torch.no_grad()
def _denoised(bundle: Bundle, predict: Callable[[Tensor, Tensor], Tensor], latents: Tensor, steps: int) -> Tensor:
    scheduler = make_scheduler("ddim", bundle.folder / "scheduler", steps)
    for timestep in scheduler.timesteps:
        prediction = predict(latents, timestep.float()[None])
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def _sizes(manifest: Manifest, engine: Engine) -> list[tuple[int, int]]:
    first = manifest.sizes[0]
    if engine.has_profile:
        return list(dict.fromkeys([first, manifest.sizes[-1]]))
    return [first, (manifest.size_multiple, 2 * manifest.size_multiple)]


def _is_static(manifest: Manifest, engine: Engine) -> bool:
    return engine.has_profile and manifest.static


def _counts(manifest: Manifest, engine: Engine) -> list[int]:
    """Numbers of images to compare with: one and, where they can be had, three."""
    if _is_static(manifest, engine):
        return [manifest.max_images]
    return sorted({1, min(3, manifest.max_images) if engine.has_profile else 3})


def _inputs(manifest: Manifest, engine: Engine, images: int, height: int, width: int) -> dict[str, Tensor]:
    """Random inputs. One row of the UNet per image, as guidance only means more rows; but static engines take no fewer."""
    rows = 2 * images if _is_static(manifest, engine) else images
    dims = {"batch": rows, "images": images, "height": height // manifest.vae_scale, "width": width // manifest.vae_scale}
    generator = torch.Generator().manual_seed(images * 1000003 + height * 1009 + width)
    shapes = {name: resolve(manifest.features[name].shape, dims) for name in (SAMPLE, LATENTS, IMAGE, TOKENS)}
    inputs = {name: torch.randn(shapes[name], generator=generator) for name in (SAMPLE, LATENTS, IMAGE)}
    inputs[TIMESTEP] = torch.tensor([501.0])
    return inputs | {TOKENS: torch.randint(0, manifest.vocabulary, shapes[TOKENS], generator=generator)}


def _errors(
    network: LoadedBundle, engine: Engine, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]
) -> Iterator[tuple[str, float, float]]:
    manifest = network.manifest
    on_device = {name: tensor.to(engine.device, DTYPES[manifest.features[name].dtype]) for name, tensor in features.items()}
    for segment in manifest.segments:
        made = network.runners[segment.name].run(on_device)
        pairs = [(made[name], features[name]) for name in segment.outputs]
        yield segment.name, max(relative_error(*pair) for pair in pairs), min(cosine(*pair) for pair in pairs)
    given = {name: on_device[name] for name in inputs}
    noise = network.compute(NOISE, given), features[NOISE]
    yield CHAIN, relative_error(*noise), cosine(*noise)
