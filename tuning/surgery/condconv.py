"""ME-CondConv: convolutions with several expert kernels, mixed for each sample by a small router.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference (Yang et al. 2019, https://arxiv.org/abs/1904.04971),
which A-SDM (https://arxiv.org/abs/2406.00210) puts into its compressed UNet. What differs from CondConv:

- The gates are 2 sigmoid(z) for the first expert and 2 sigmoid(z) - 1 for the others, and routers start at zero: the gates then
  are exactly 1, 0, ..., 0, and the mixed kernel is the first expert's, bit for bit. A UNet starts as what it was before.
- A router may read the timestep's embedding in place of the input's average ("timestep" in place of "features"). All samples of
  a denoising step share it, so that one kernel, mixed once per step, serves a batch of any size.
- The experts share one bias, which is not mixed.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CondConv2d", "CondConvResnet", "Router", "gates"]

Router = Literal["timestep", "features"]


def gates(scores: Tensor) -> Tensor:
    """How much of each expert is mixed in, from a router's (n, experts): 1, 0, ..., 0 where they are all zero."""
    others = 2 * torch.sigmoid(scores) - 1
    return torch.cat([others[:, :1] + 1, others[:, 1:]], dim=1)


class CondConv2d(nn.Module):
    """A 3 x 3 convolution of stride 1 with `count` kernels: the given one first, the others random at its scale.

    Each kernel is a parameter of its own, (out, in, 3, 3), as an optimizer for matrices wants it.
    """

    def __init__(self, convolution: nn.Conv2d, count: int, router: Router, time_width: int) -> None:
        super().__init__()
        first = convolution.weight.detach()
        assert convolution.bias is not None
        assert first.shape[2:] == (3, 3)
        scale = first.std()
        others = [torch.randn_like(first) * scale for _ in range(count - 1)]
        self.kernels = nn.ParameterList([first.clone(), *others])
        self.bias = nn.Parameter(convolution.bias.detach().clone())
        self.reads: Router = router
        width = first.shape[1] if router == "features" else time_width
        self.router = nn.Linear(width, count, device=first.device, dtype=first.dtype)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)

    def mixed(self, amounts: Tensor) -> Tensor:
        """The kernel (out, in, 3, 3) of one sample's gates (count,)."""
        kernel: Tensor = amounts[0] * self.kernels[0]
        for amount, expert in zip(amounts[1:], list(self.kernels)[1:], strict=True):
            kernel = kernel + amount * expert
        return kernel

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(n, in, h, w) and the activated time embedding (n, time width) -> (n, out, h, w)."""
        amounts = gates(self.router(x.mean((2, 3)) if self.reads == "features" else time))
        # Not in training: there each sample's gates need a gradient of their own. Rows of a product may be rounded unlike.
        if not torch.is_grad_enabled() and torch.allclose(amounts, amounts[:1], rtol=0, atol=1e-6):
            return functional.conv2d(x, self.mixed(amounts[0]), self.bias, padding=1)
        # Mixing for each sample is less arithmetic, but slower as yet, forward and backward on a CPU: grouped convolutions and
        # matrix products on unfolded inputs have kernels that are far from as well tuned as that of a plain convolution.
        out: Tensor = self.bias[:, None, None]
        for amount, kernel in zip(amounts.unbind(1), self.kernels, strict=True):
            out = torch.addcmul(out, amount[:, None, None, None], functional.conv2d(x, kernel, padding=1))
        return out


class CondConvResnet(nn.Module):
    """A ResNet of the Stable Diffusion family, both of whose 3 x 3 convolutions are conditional.

    Takes over the parts of a diffusers ResnetBlock2D under their names: only `conv1` and `conv2` have other weights than there.
    """

    def __init__(self, resnet: Any, count: int, router: Router) -> None:
        super().__init__()
        width = resnet.time_emb_proj.in_features
        self.norm1, self.conv1 = resnet.norm1, CondConv2d(resnet.conv1, count, router, width)
        self.time_emb_proj, self.norm2, self.dropout = resnet.time_emb_proj, resnet.norm2, resnet.dropout
        self.conv2 = CondConv2d(resnet.conv2, count, router, width)
        self.nonlinearity, self.conv_shortcut = resnet.nonlinearity, resnet.conv_shortcut

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        """(n, in, h, w) and the time embedding (n, time width) -> (n, out, h, w)."""
        time = self.nonlinearity(temb)
        x = self.conv1(self.nonlinearity(self.norm1(input_tensor)), time)
        x = self.norm2(x + self.time_emb_proj(time)[:, :, None, None])
        x = self.conv2(self.dropout(self.nonlinearity(x)), time)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        result: Tensor = shortcut + x
        return result
