"""What segments are compared on: picture sizes, numbers of images, and random inputs of the UNet and the VAE."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engines import Engine, Manifest, Runner, Segment
from engines.bundle.names import IMAGE, LATENTS, SAMPLE, TIMESTEP, TOKENS, VAE
from engines.bundle.shapes import resolve

__all__ = ["counts_to_compare", "images_at_a_time", "random_inputs", "run_in_parts", "sizes_to_compare"]


def sizes_to_compare(manifest: Manifest, engine: Engine) -> list[tuple[int, int]]:
    """Picture sizes (height, width) in pixels: the bundle's own and one other."""
    first = manifest.sizes[0]
    if engine.has_profile:
        return list(dict.fromkeys([first, manifest.sizes[-1]]))
    return [first, (manifest.size_multiple, 2 * manifest.size_multiple)]


def _is_static(manifest: Manifest, engine: Engine) -> bool:
    return engine.has_profile and manifest.static


def counts_to_compare(manifest: Manifest, engine: Engine) -> list[int]:
    """Numbers of images to compare with: one and, where they can be had, three."""
    if _is_static(manifest, engine):
        return [manifest.max_images]
    return sorted({1, min(3, manifest.max_images) if engine.has_profile else 3})


def images_at_a_time(manifest: Manifest, engine: Engine, segment: Segment) -> int | None:
    """How many pictures a segment's engine takes at a time; None where it takes all of a call."""
    return manifest.vae_images if engine.has_profile and VAE.issuperset(segment.units) else None


def random_inputs(manifest: Manifest, engine: Engine, images: int, height: int, width: int) -> dict[str, Tensor]:
    """Random inputs. One row of the UNet per image, as guidance only means more rows; but static engines take no fewer."""
    rows = 2 * images if _is_static(manifest, engine) else images
    dims = {"batch": rows, "images": images, "height": height // manifest.vae_scale, "width": width // manifest.vae_scale}
    generator = torch.Generator().manual_seed(images * 1000003 + height * 1009 + width)
    shapes = {name: resolve(manifest.features[name].shape, dims) for name in (SAMPLE, LATENTS, IMAGE, TOKENS)}
    inputs = {name: torch.randn(shapes[name], generator=generator) for name in (SAMPLE, LATENTS, IMAGE)}
    inputs[TIMESTEP] = torch.tensor([501.0])
    return inputs | {TOKENS: torch.randint(0, manifest.vocabulary, shapes[TOKENS], generator=generator)}


def run_in_parts(runner: Runner, given: Mapping[str, Tensor], images: int | None) -> dict[str, Tensor]:
    """The runner's outputs, so many images at a time; all at once where that is None."""
    inputs = {name: given[name] for name in runner.segment.inputs}
    if images is None:
        return runner.run(inputs)
    parts = zip(*(tensor.split(images) for tensor in inputs.values()), strict=True)
    made = [runner.run(dict(zip(inputs, part, strict=True))) for part in parts]
    return {name: torch.cat([part[name] for part in made]) for name in runner.segment.outputs}
