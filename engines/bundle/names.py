"""The names of the graph: its inputs, the features that all packages speak of, and the units outside the UNet.

A feature is named after the unit that makes it, so that ``TEXT`` is the text encoder and what it makes. All other units are the
UNet's, and named after the modules that they come from (``down.0.layer.1.resnet``).
"""

from collections.abc import Iterable

__all__ = [
    "ATTENTION",
    "BRANCH",
    "IMAGE",
    "LATENTS",
    "NOISE",
    "OUTSIDE",
    "SAMPLE",
    "STEM",
    "TEXT",
    "TIME",
    "TIMESTEP",
    "TOKENS",
    "VAE",
    "VAE_DECODER",
    "VAE_ENCODER",
    "attention_parts",
]

TOKENS = "tokens"
"""Graph input: token numbers (batch, text length), int64."""
SAMPLE = "sample"
"""Graph input: noisy latents (batch, channels, height, width), float32."""
TIMESTEP = "timestep"
"""Graph input: one timestep for the whole batch (1,), float32."""
LATENTS = "latents"
"""Graph input of the VAE decoder: denoised latents (images, channels, height, width), float32."""
IMAGE = "image"
"""Graph input of the VAE encoder: a picture in [-1, 1] (images, 3, pixels, pixels), float32."""

TEXT = "text_encoder"
"""Made once per prompt, and read by the UNet's transformers: (batch, tokens, width)."""
VAE_DECODER = "vae_decoder"
"""A picture in [-1, 1] (images, 3, pixels, pixels), float32."""
VAE_ENCODER = "vae_encoder"
"""Means and standard deviations of a picture's latents (images, 2 * channels, height, width), float32."""
VAE = frozenset({VAE_DECODER, VAE_ENCODER})
OUTSIDE = frozenset({TEXT, *VAE})
"""The units that are not the UNet's: no plan can name them."""

TIME = "time"
"""The timestep's embedding (1, width), read by every ResNet."""
STEM = "stem"
"""The UNet's first convolution."""
NOISE = "head"
"""The feature that a step is asked for: the noise prediction (or velocity), made by the UNet's head."""
BRANCH = ".branch"
"""Ending of the feature that a ResNet or transformer adds to its input."""
ATTENTION = ".attention"
"""Ending of the names of transformers."""
_PARTS = (".input", f".self{BRANCH}", ".self", f".cross{BRANCH}", ".cross")


def attention_parts(units: Iterable[str]) -> list[str]:
    """The units that transformers are cut into beside their branch and sum, in bundles of plans that name one of them.

    They are its input's projection, and its self- and its cross-attention, with a branch each.
    """
    return [f"{unit}{part}" for unit in units if unit.endswith(ATTENTION) for part in _PARTS]
