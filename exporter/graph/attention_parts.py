"""Self- and cross-attention as units of their own: a transformer cut where a plan names a part of it.

A transformer of Stable Diffusion projects its input, adds self-attention, adds cross-attention, adds a feed-forward layer, and
projects the result. Cut, it is seven units in place of two: ``X.input``, ``X.self.branch`` and ``X.self``, ``X.cross.branch``
and ``X.cross``, and as ever ``X.branch`` and ``X``. Features between them are pictures, as all features of a UNet are.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from engines.bundle.manifest import Unit
from engines.bundle.names import BRANCH, TEXT
from exporter.errors import SourceError
from runtime.plans.key_steps import Threshold
from runtime.plans.plan import Plan, names_only_parts

__all__ = ["PART_PATHS", "asks_for_parts", "part_module", "part_units", "picture", "tokens"]

_BLOCK = "transformer_blocks.0"
PART_PATHS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "input": ("norm", "proj_in"),
        "self.branch": (f"{_BLOCK}.norm1", f"{_BLOCK}.attn1"),
        "self": (),
        "cross.branch": (f"{_BLOCK}.norm2", f"{_BLOCK}.attn2"),
        "cross": (),
        "branch": (f"{_BLOCK}.norm3", f"{_BLOCK}.ff", "proj_out"),
    }
)
"""The modules of a transformer that each of its parts is made of."""


def asks_for_parts(plans: Sequence[Plan], units: Sequence[str]) -> bool:
    """Whether a plan names what a UNet has only where its transformers are cut.

    Args:
        plans: which a bundle is built for.
        units: names of the UNet's units, transformers in one piece.
    """
    rules = [rule for plan in plans for rule in plan.rules]
    named = [pattern for rule in rules for pattern in rule.units]
    named += [rule.when.feature for rule in rules if isinstance(rule.when, Threshold)]
    return any(names_only_parts(pattern, units) for pattern in named)


def part_units(transformer: str, x: str) -> list[Unit]:
    """The units of a transformer that reads ``x``, all but the sum of ``x`` and its branch."""
    first, own, cross = (f"{transformer}.{part}" for part in ("input", "self", "cross"))
    return [
        Unit(name=first, kind="attention input", inputs=(x,)),
        Unit(name=f"{own}{BRANCH}", kind="self-attention branch", inputs=(first,)),
        Unit(name=own, kind="self-attention", inputs=(first, f"{own}{BRANCH}")),
        Unit(name=f"{cross}{BRANCH}", kind="cross-attention branch", inputs=(own, TEXT)),
        Unit(name=cross, kind="cross-attention", inputs=(own, f"{cross}{BRANCH}")),
        Unit(name=f"{transformer}{BRANCH}", kind="attention branch", inputs=(cross,)),
    ]


def part_module(transformer: Any, name: str, part: str) -> nn.Module:
    """The module of one part, as ``PART_PATHS`` calls it, of the transformer of that name.

    Raises:
        SourceError: the transformer is none of Stable Diffusion 1.x or 2.x.
    """
    blocks = transformer.transformer_blocks
    if len(blocks) != 1 or blocks[0].attn2 is None or blocks[0].only_cross_attention or blocks[0].norm_type != "layer_norm":
        raise SourceError(
            f"UNet unit {name} is not one block of self-attention, cross-attention and feed-forward layer as in Stable Diffusion "
            "1.x and 2.x, so it cannot be cut into parts; build for plans that name whole attentions"
        )
    if part == "input":
        return _Input(transformer)
    if part == "branch":
        return _FeedForward(transformer)
    if part.endswith(BRANCH):
        block = blocks[0]
        return _Attention(block.norm1, block.attn1) if part.startswith("self") else _Attention(block.norm2, block.attn2)
    return _Sum()


class _Input(nn.Module):
    """Feature -> what the transformer's block reads."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.norm, self.projection, self.linear = transformer.norm, transformer.proj_in, bool(transformer.use_linear_projection)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        result: Tensor = picture(self.projection(tokens(x)), *x.shape[2:]) if self.linear else self.projection(x)
        return result


class _Attention(nn.Module):
    """Feature, for cross-attention also text (batch, tokens, width) -> what the attention adds."""

    def __init__(self, norm: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention

    def forward(self, x: Tensor, text: Tensor | None = None) -> Tensor:
        return picture(self.attention(self.norm(tokens(x)), encoder_hidden_states=text), *x.shape[2:])


class _Sum(nn.Module):
    """Feature and what an attention adds -> feature."""

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        return branch + x


class _FeedForward(nn.Module):
    """Feature behind both attentions -> what the transformer adds to its own input."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        block = transformer.transformer_blocks[0]
        self.norm, self.layers = block.norm3, block.ff
        self.projection, self.linear = transformer.proj_out, bool(transformer.use_linear_projection)

    def forward(self, x: Tensor) -> Tensor:
        rows = tokens(x)
        rows = self.layers(self.norm(rows)) + rows
        size = x.shape[2:]
        result: Tensor = picture(self.projection(rows), *size) if self.linear else self.projection(picture(rows, *size))
        return result


def tokens(x: Tensor) -> Tensor:
    """A picture (rows, channels, height, width) as tokens (rows, height * width, channels)."""
    rows, channels, height, width = x.shape
    return x.reshape(rows, channels, height * width).transpose(1, 2)


def picture(x: Tensor, height: int, width: int) -> Tensor:
    """Tokens as a picture."""
    rows, _, channels = x.shape
    result: Tensor = x.transpose(1, 2).reshape(rows, channels, height, width)
    return result
