"""Compare every segment of a bundle, and the whole chain, with the torch model that it was made from.

The reference is the diffusers UNet itself, run in one piece with hooks that keep what each module made; it shares neither the
topology nor the partition with what is compared. Each segment is fed the reference's features, so that errors do not add up;
the chain is fed its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from engines import DTYPES, Bundle, Engine, make_engine
from engines.manifest import Manifest, Precision
from engines.shapes import resolve
from exporter.errors import BuildError
from exporter.graph import IMAGE, LATENTS, TOKENS, VAE_DECODER, VAE_ENCODER, TextEncoder, check_size
from exporter.sources import open_source
from exporter.topology import SAMPLE, TEXT, TIMESTEP
from runtime.executor import Network
from runtime.plan import NOISE
from tuning.units import unit_modules

__all__ = ["TOLERANCE", "Comparison", "verify", "verify_command"]

TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "fp16": 5e-3}
"""Largest allowed error relative to the reference's maximum. The reference is float32 in both cases."""
_CHAIN = "the chain"


@dataclass(frozen=True)
class Comparison:
    """One segment (or the chain) at one size: the largest error of its outputs, relative to the reference's maximum."""

    segment: str
    images: int
    height: int
    width: int
    error: float


@dataclass(frozen=True)
class _Reference:
    """The torch model in float32, and what its modules make of given inputs."""

    unet: nn.Module
    text: nn.Module
    vae: AutoencoderKL

    def features(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every feature by name, from tokens, sample, timestep, latents and image."""
        features = dict(inputs)
        paths = {path: name for name, path in unit_modules(self.unet).items()} | {"time_embedding": "time"}
        hooks = [self.unet.get_submodule(path).register_forward_hook(_keep(features, name)) for path, name in paths.items()]
        try:
            with torch.no_grad():
                features[TEXT] = self.text(inputs[TOKENS])
                self.unet(inputs[SAMPLE], inputs[TIMESTEP], features[TEXT])
                features |= self._vae_features(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        features["time"] = features["time"][:1]  # the UNet repeats the one timestep for every row
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


def verify(bundle: Bundle, engine: Engine, sizes: Sequence[tuple[int, int]] = ()) -> Iterator[Comparison]:
    """Compare all segments and the chain with the torch model on random inputs, for each size and two numbers of images.

    Args:
        bundle: what to verify.
        engine: what runs its segments.
        sizes: picture sizes (height, width) in pixels; by default the bundle's first and one other.

    Raises:
        SourceError: the bundle's source cannot be found any more.
        BuildError: the source's weights are others than the bundle was made from, or a size is none that the UNet takes.
    """
    manifest = bundle.manifest
    for size in sizes:
        check_size(size, manifest.size_multiple)
    reference = _load_reference(bundle)
    network = Network.load(bundle, engine)
    for height, width in sizes or _sizes(manifest, engine):
        for images in sorted({1, min(3, manifest.max_images) if engine.has_profile else 3}):
            inputs = _inputs(manifest, images, height, width)
            features = reference.features(inputs)
            for segment, error in _errors(network, engine, inputs, features):
                yield Comparison(segment, images, height, width, error)


def _load_reference(bundle: Bundle) -> _Reference:
    manifest = bundle.manifest
    checkpoint = open_source(manifest.source, manifest.variant, None if manifest.unet is None else Path(manifest.unet))
    if checkpoint.fingerprint(manifest.variant) != manifest.source_sha256:
        raise BuildError(
            f"the weights of source {manifest.source} are not those that bundle {bundle.folder} was made from; "
            "build it anew with --force, then verify it"
        )
    return _Reference(
        checkpoint.unet(manifest.variant).eval(), TextEncoder(checkpoint.text_encoder()).eval(), checkpoint.vae().eval()
    )


def _sizes(manifest: Manifest, engine: Engine) -> list[tuple[int, int]]:
    first = manifest.sizes[0]
    if engine.has_profile:
        return list(dict.fromkeys([first, manifest.sizes[-1]]))
    return [first, (manifest.size_multiple, 2 * manifest.size_multiple)]


def _inputs(manifest: Manifest, images: int, height: int, width: int) -> dict[str, Tensor]:
    """Random inputs. One row of the UNet per image: guidance is no other thing than more rows."""
    dims = {"batch": images, "images": images, "height": height // manifest.vae_scale, "width": width // manifest.vae_scale}
    generator = torch.Generator().manual_seed(images * 1000003 + height * 1009 + width)
    shapes = {name: resolve(manifest.features[name].shape, dims) for name in (SAMPLE, LATENTS, IMAGE, TOKENS)}
    inputs = {name: torch.randn(shapes[name], generator=generator) for name in (SAMPLE, LATENTS, IMAGE)}
    inputs[TIMESTEP] = torch.tensor([501.0])
    return inputs | {TOKENS: torch.randint(0, manifest.vocabulary, shapes[TOKENS], generator=generator)}


def _errors(
    network: Network, engine: Engine, inputs: Mapping[str, Tensor], features: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    manifest = network.manifest
    on_device = {name: tensor.to(engine.device, DTYPES[manifest.features[name].dtype]) for name, tensor in features.items()}
    for segment in manifest.segments:
        made = network.runners[segment.name].run(on_device)
        yield segment.name, max(_relative(made[name], features[name]) for name in segment.outputs)
    given = {name: on_device[name] for name in inputs}
    yield _CHAIN, _relative(network.compute(NOISE, given), features[NOISE])


def _relative(made: Tensor, reference: Tensor) -> float:
    return float((made.float().cpu() - reference).abs().max() / reference.abs().max())


def verify_command(folder: Path, engine: str, sizes: Sequence[tuple[int, int]], console: Console) -> bool:
    """Verify a bundle, print the error of each segment, and say whether all are within the tolerance."""
    bundle = Bundle.open(folder)
    bundle.check()
    tolerance = TOLERANCE[bundle.manifest.precision]
    columns: dict[str, None] = {}
    rows: dict[str, list[float]] = {}
    for comparison in verify(bundle, make_engine(engine), sizes):
        columns[f"{comparison.images} x {comparison.height}x{comparison.width}"] = None
        rows.setdefault(comparison.segment, []).append(comparison.error)
        if comparison.segment == _CHAIN:
            console.print(f"compared {list(columns)[-1]}", highlight=False)
    table = Table(title=f"{folder} on {engine}: error relative to torch float32 (allowed: {tolerance:g})")
    for name in ("segment", *columns):
        table.add_column(name, justify="left" if name == "segment" else "right")
    for segment, errors in rows.items():
        table.add_row(segment, *(f"{error:.1e}" if error <= tolerance else f"[red]{error:.1e}[/red]" for error in errors))
    console.print(table)
    worst, where = max((max(errors), segment) for segment, errors in rows.items())
    good = worst <= tolerance
    console.print(
        f"{'all within' if good else 'NOT within'} {tolerance:g}; the largest error is {worst:.1e} ({where})", highlight=False
    )
    return good
