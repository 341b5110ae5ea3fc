"""Muon for weight matrices and AdamW for the rest, behind one object with one state.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) orthogonalises each matrix's momentum. torch.optim.Muon
takes matrices only, so a convolution kernel is handed to it as a view of (out, in * height * width) that shares the
kernel's memory. It suits small models on plain data, such as the embedded one: there its steps, which are dearer, are worth more.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAdamW"]

# First and last layers, embeddings and the few rows of a router are no hidden matrices: AdamW trains them.
_OUTER = ("conv_in", "conv_out", "embedding", "quant_conv", "router")


def _matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """(out, ...) as (out, columns) in the order in which `like` lies in memory, so that `like` itself needs no copy."""
    return tensor.flatten(1) if like.is_contiguous() else tensor.permute(0, *range(2, like.ndim), 1).flatten(1)


class MuonAdamW:
    """Both optimizers over one module's trainable parameters; learning rates scale with one factor per step."""

    def __init__(self, module: nn.Module, *, lr: float, muon_lr: float, weight_decay: float = 0.05) -> None:
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            inner = muon_lr > 0 and parameter.ndim >= 2 and not any(part in name for part in _OUTER)
            (hidden if inner else rest).append(parameter)
        self._rest, self._hidden = rest, hidden
        self._views = [nn.Parameter(_matrix(p.data, p)) for p in hidden]
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
        if self._views:
            muon = torch.optim.Muon(self._views, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="original")
            self._optimizers.append(muon)
        self._base = [o.param_groups[0]["lr"] for o in self._optimizers]
        self.parameters = rest + hidden

    def step(self, factor: float, clip: float, scaler: torch.amp.GradScaler | None = None) -> None:
        """One update with every learning rate at `factor` of its base; gradients are clipped to the norm `clip`, and freed.

        With a scaler, gradients are brought back to their scale first, and an optimizer whose gradients overflowed waits.
        """
        for view, parameter in zip(self._views, self._hidden, strict=True):
            if parameter.grad is not None:
                view.grad = _matrix(parameter.grad, parameter)
        if scaler is not None:
            for optimizer in self._optimizers:
                scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(self._rest + self._views, clip)
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
            optimizer.step() if scaler is None else scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        if scaler is not None:
            scaler.update()
        for parameter in self._hidden:
            parameter.grad = None

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of both optimizers."""
        return [optimizer.state_dict() for optimizer in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restores what `state_dict` gave."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)
