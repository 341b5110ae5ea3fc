"""A model's prediction as the noise or the picture that it stands for, and back.

What a UNet is given is ``x = alpha * x0 + sigma * eps`` with ``alpha**2 + sigma**2 = 1``, by whatever scheduler: those that work
with larger sigmas scale it down first (``scale_model_input``). Its prediction is eps, x0, or ``v = alpha * eps - sigma * x0``
(Salimans and Ho, arXiv 2202.00512, appendix D).
"""

from typing import Literal

import numpy as np
from torch import Tensor

__all__ = ["PREDICTION_TYPES", "PredictionSpaces", "Space"]

Space = Literal["raw", "eps", "x0"]


PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
"""The spaces of predictions by what diffusers calls them."""


class PredictionSpaces:
    """Turns predictions of one model into another space and back.

    Args:
        alphas_cumprod: alpha squared at each timestep that the model was trained for, falling.
        prediction_type: the model's, in diffusers' words: ``epsilon``, ``v_prediction`` or ``sample``.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str) -> None:
        shares = np.clip(alphas_cumprod.double().cpu().numpy(), 1e-12, 1 - 1e-12)
        self._log_ratios = np.log((1 - shares) / shares)
        self._type = prediction_type

    def to(self, space: Space, prediction: Tensor, sample: Tensor, timestep: float) -> Tensor:
        """A prediction for a sample, both (rows, channels, height, width), in another space."""
        alpha, sigma = self._scales(timestep)
        if space in {"raw", PREDICTION_TYPES[self._type]}:
            return prediction
        if self._type == "v_prediction":
            return alpha * sample - sigma * prediction if space == "x0" else alpha * prediction + sigma * sample
        return _other(space, prediction, sample, alpha, sigma)

    def back(self, space: Space, value: Tensor, sample: Tensor, timestep: float) -> Tensor:
        """The prediction for a sample that stands for a noise or a picture."""
        alpha, sigma = self._scales(timestep)
        if space in {"raw", PREDICTION_TYPES[self._type]}:
            return value
        if self._type == "v_prediction":
            return (alpha * sample - value) / sigma if space == "x0" else (value - sigma * sample) / alpha
        return _other(PREDICTION_TYPES[self._type], value, sample, alpha, sigma)

    def noise_scale(self, timestep: float) -> float:
        """The factor from the difference of two predictions for one sample to that of the noises that they stand for."""
        alpha, sigma = self._scales(timestep)
        return {"eps": 1.0, "v": alpha, "x0": -alpha / sigma}[PREDICTION_TYPES[self._type]]

    def _scales(self, timestep: float) -> tuple[float, float]:
        """Alpha and sigma of a timestep; between two that were trained for, by the logarithm of their ratio."""
        log_ratio = float(np.interp(timestep, np.arange(len(self._log_ratios)), self._log_ratios))
        share = 1 / (1 + np.exp(log_ratio))
        return float(np.sqrt(share)), float(np.sqrt(1 - share))


def _other(space: str, value: Tensor, sample: Tensor, alpha: float, sigma: float) -> Tensor:
    """The noise that goes with a picture, or the picture that goes with a noise."""
    return (sample - sigma * value) / alpha if space == "x0" else (sample - alpha * value) / sigma
