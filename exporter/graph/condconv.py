"""How conditional convolutions are written into a graph (see `tuning.surgery.condconv`).

A router that reads the timestep has one kernel for the whole batch, mixed in the branch that convolves with it: that is once per
step, and the convolution reads it as it would any other. A router that reads features has a kernel for each sample, and ONNX has
no convolution that takes several: `Form` names the ways round that. `python -m benchmarks.condconv.costs` measures them all.
"""

import copy
from collections.abc import Callable
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan
from torch.nn import functional

from tuning.surgery.condconv import CondConv2d, gates

__all__ = ["FORM", "FORMS", "Form", "Mixing", "exported"]

Form = Literal["scan", "slices", "experts", "grouped"]
"""One convolution per sample in a loop that takes any batch; nine matrix products of shifted inputs; every expert's convolution,
then their weighted sum; the batch folded into groups, whose number is fixed when it is exported."""
FORMS: tuple[Form, ...] = get_args(Form)
FORM: Form = "scan"
"""The form in bundles: of those for any batch the fastest on ONNX Runtime's CPU, and the one with the fewest layers in
TensorRT-RTX (29 for one convolution, slices 437): benchmarks/results/condconv.json."""


class Mixing(nn.Module):
    """Condition (n, width) -> kernels (n, out, in, 3, 3), in as few operators as there can be: small models feel each.

    The experts lie in one matrix, so that mixing is one product; 2 sigmoid(z) - 1 is tanh(z / 2), and the router gives z / 2.
    """

    def __init__(self, conditional: CondConv2d) -> None:
        super().__init__()
        kernels = torch.stack([kernel.detach().flatten() for kernel in conditional.kernels])
        self.experts, self.shape = nn.Parameter(kernels, requires_grad=False), conditional.kernels[0].shape
        self.router = copy.deepcopy(conditional.router)
        for parameter in self.router.parameters():
            parameter.data = parameter.data / 2
        self.first: Tensor
        self.register_buffer("first", torch.eye(1, len(kernels), dtype=kernels.dtype, device=kernels.device))

    def forward(self, condition: Tensor) -> Tensor:
        gates = torch.tanh(self.router(condition)) + self.first
        result: Tensor = (gates @ self.experts).unflatten(1, self.shape)
        return result


class _ByTimestep(nn.Module):
    """Feature (n, in, h, w) and the activated time embedding (1, width) -> (n, out, h, w)."""

    def __init__(self, conditional: CondConv2d) -> None:
        super().__init__()
        self.mixing, self.bias = Mixing(conditional), conditional.bias

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return functional.conv2d(x, self.mixing(time)[0], self.bias, padding=1)


class _ByFeatures(nn.Module):
    """Feature (n, in, h, w) -> (n, out, h, w); the time embedding is not read."""

    def __init__(self, conditional: CondConv2d, form: Form) -> None:
        super().__init__()
        self.mixing, self.bias = Mixing(conditional), conditional.bias
        self._convolve = _CONVOLVE[form]

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return self._convolve(x, self.mixing(x.mean((2, 3))), self.bias)


class _WeightedSum(nn.Module):
    """Feature (n, in, h, w) -> (n, out, h, w), the weighted sum of every expert's convolution; the time embedding is not read."""

    def __init__(self, conditional: CondConv2d) -> None:
        super().__init__()
        self.conditional = conditional

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        amounts = gates(self.conditional.router(x.mean((2, 3))))
        out: Tensor = self.conditional.bias[:, None, None]
        for amount, kernel in zip(amounts.split(1, dim=1), self.conditional.kernels, strict=True):
            out = out + amount[:, :, None, None] * functional.conv2d(x, kernel, padding=1)
        return out


def _scan(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return _grouped(x, kernels, bias)  # the same sums; there is no need of a loop where the batch is known

    def one(carry: Tensor, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        feature, kernel = sample
        return carry.clone(), functional.conv2d(feature[None], kernel, bias, padding=1)[0]

    out: Tensor = scan(one, x.new_zeros(1), (x, kernels))[1]  # a scan must carry something from sample to sample
    return out


def _slices(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    height, width = x.shape[2:]
    padded = functional.pad(x, (1, 1, 1, 1))
    kernels = kernels.permute(3, 4, 0, 1, 2)  # all at once: cheap beside nine products with kernels that are no blocks
    shifts = [(i, j) for i in range(3) for j in range(3)]
    products = [kernels[i, j] @ padded[:, :, i : i + height, j : j + width].flatten(2) for i, j in shifts]
    out: Tensor = reduce(torch.add, products).unflatten(2, (height, width)) + bias[:, None, None]
    return out


def _grouped(x: Tensor, kernels: Tensor, bias: Tensor) -> Tensor:
    rows = int(x.shape[0])
    out = functional.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), padding=1, groups=rows)
    separate: Tensor = out[0].unflatten(0, (rows, -1)) + bias[:, None, None]
    return separate


_CONVOLVE: dict[Form, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"scan": _scan, "slices": _slices, "grouped": _grouped}


def exported(conditional: CondConv2d, form: Form = FORM) -> nn.Module:
    """A module that computes a conditional convolution from feature and activated time embedding; `form` is for features."""
    if conditional.reads == "timestep":
        return _ByTimestep(conditional)
    return _WeightedSum(conditional) if form == "experts" else _ByFeatures(conditional, form)
