"""Distillation: the losses that teach an assembled UNet to do what its original does.

As in BK-SDM (arXiv 2305.15798): the noise (or velocity) target, the teacher's output, and the output of every block,
each as a mean squared error; blocks are matched by name, so a student may have fewer layers in them, no mid block, or
no innermost stages.
What differs: a block's error is divided by the mean square of the teacher's feature. Those of the embedded UNet's blocks are
far above the noise's, so that plain errors would drown the other two losses.
"""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from tuning.errors import TuningError
from tuning.surgery.recipes import LossWeights

__all__ = ["BlockFeatures", "DistillLoss", "check_pair", "matched"]


def _blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Block name -> module: down.0 ..., mid, up.0 ..."""
    blocks = {f"down.{i}": block for i, block in enumerate(unet.down_blocks)}  # type: ignore[arg-type]
    if getattr(unet, "mid_block", None) is not None:
        blocks["mid"] = unet.mid_block
    return blocks | {f"up.{i}": block for i, block in enumerate(unet.up_blocks)}  # type: ignore[arg-type]


def _sampled(unet: nn.Module, name: str) -> bool:
    """Whether the block ends in a sampler."""
    block = _blocks(unet)[name]
    return bool(getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None))


def matched(teacher: nn.Module, student: nn.Module) -> dict[str, str]:
    """The blocks that both have: the teacher's name -> the student's, in the teacher's order.

    Ways down are matched from the first block and ways up from the last: both ends are the outermost resolution, so a
    student without the innermost stages (BK-SDM tiny) finds its blocks too.
    """
    theirs, ours = _blocks(teacher), _blocks(student)
    missing = len(teacher.up_blocks) - len(student.up_blocks)  # type: ignore[arg-type]
    pairs = {}
    for name in theirs:
        kind, _, number = name.partition(".")
        own = f"up.{int(number) - missing}" if kind == "up" else name
        if own in ours and not (kind == "mid" and missing):  # a mid block further out works at another size
            pairs[name] = own
    return pairs


def check_pair(teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    """Raises TuningError when the two can't be compared: unlike latent channels, text width or block widths.

    A student may lack the teacher's innermost stages.
    """
    for key, words in (
        ("in_channels", "latent channels in"),
        ("out_channels", "latent channels out"),
        ("cross_attention_dim", "text width"),
        ("block_out_channels", "block widths"),
    ):
        theirs, ours = teacher.config[key], student.config[key]
        if key == "block_out_channels":
            theirs, ours = list(theirs), list(ours)
            same = theirs[: len(ours)] == ours
        else:
            same = theirs == ours
        if not same:
            raise TuningError(
                f"teacher and student differ in {words}: {theirs} and {ours}; assemble the student from this teacher"
            )


class BlockFeatures(AbstractContextManager["BlockFeatures"]):
    """Collects the named blocks' outputs in `values` (n, c, h, w) during forward passes inside the context.

    Of the blocks in `unsampled`, what goes into the sampler is taken instead of what comes out.
    """

    def __init__(self, unet: nn.Module, names: Iterable[str], unsampled: Collection[str] = ()) -> None:
        self._unet, self._names, self._unsampled = unet, names, unsampled
        self._stack = ExitStack()
        self.values: dict[str, Tensor] = {}

    def __enter__(self) -> "BlockFeatures":
        blocks = _blocks(self._unet)
        for name in self._names:
            self._stack.callback(blocks[name].register_forward_hook(self._keeper(name)).remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
            # A down block returns its output and its skip connections: one for each layer, then the sampler's.
            if name in self._unsampled:
                output = output[1][len(module.resnets) - 1]  # type: ignore[arg-type]
            self.values[name] = output[0] if isinstance(output, tuple) else output

        return keep


def _relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """The squared error as a share of the teacher's mean square; in float32, whose range the squares need."""
    ours, theirs = ours.float(), theirs.float()
    return nn.functional.mse_loss(ours, theirs) / theirs.square().mean().clamp_min(1e-8)


class DistillLoss:
    """The three losses of one batch for a frozen teacher and a student of the same stages."""

    def __init__(self, teacher: UNet2DConditionModel, student: UNet2DConditionModel, weights: LossWeights) -> None:
        check_pair(teacher, student)
        self._teacher = teacher.eval().requires_grad_(False)
        self._student, self._weights = student, weights
        self._pairs = matched(teacher, student)
        # The student's innermost way down has no sampler; where the teacher goes deeper, its block has one.
        unequal = (t for t, s in self._pairs.items() if _sampled(teacher, t) != _sampled(student, s))
        self._unsampled = {name for name in unequal if name.startswith("down.")}

    def __call__(self, noisy: Tensor, timesteps: Tensor, states: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses "noise", "output", "features" (summed over blocks) and their weighted sum "loss".

        Shapes: noisy and target (n, c, h, w), timesteps (n,), states (n, length, text width).
        """
        with torch.no_grad(), BlockFeatures(self._teacher, self._pairs, self._unsampled) as theirs:
            taught = self._taught(noisy, timesteps, states)
        with BlockFeatures(self._student, self._pairs.values(), {self._pairs[n] for n in self._unsampled}) as ours:
            predicted = self._student(noisy, timesteps, states).sample.float()
        mse = nn.functional.mse_loss
        shares = [_relative(ours.values[own], theirs.values[name]) for name, own in self._pairs.items()]
        losses = {"noise": mse(predicted, target), "output": mse(predicted, taught), "features": torch.stack(shares).sum()}
        w = self._weights
        total = w.noise * losses["noise"] + w.output * losses["output"] + w.features * losses["features"]
        return {"loss": total} | losses

    def _taught(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        """The teacher's output, computed in the precision of its weights whatever the student's is."""
        dtype = self._teacher.dtype
        with torch.autocast(noisy.device.type, enabled=False):
            taught: Tensor = self._teacher(noisy.to(dtype), timesteps, states.to(dtype)).sample
        return taught.float()
