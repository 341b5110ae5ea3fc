"""The prediction type that a single file names for its UNet: the noise, or v (Salimans and Ho, arXiv 2202.00512).

Stability AI's ModelSpec has ``modelspec.prediction_type`` in the header for it; ComfyUI writes ``modelspec.predict_key`` there,
and a tensor ``v_pred``, with ``ztsnr`` beside it where noise went up to a signal of zero (Lin et al., arXiv 2305.08891).
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from tuning.checkpoints.weights import metadata_of, names_in

__all__ = ["Prediction", "read_prediction"]

_SETTINGS = ("modelspec.prediction_type", "modelspec.predict_key")
_V, _ZERO_SNR = "v_pred", "ztsnr"
_WORDS: dict[str, Literal["epsilon", "v_prediction"]] = {
    "epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction",
    "v_pred": "v_prediction", "velocity": "v_prediction",
}  # fmt: skip


class Prediction(NamedTuple):
    """A prediction type in diffusers' word (None where the file's word is not known), the entry of the file that names it, and
    whether the noise went up to a signal of zero.
    """

    kind: Literal["epsilon", "v_prediction"] | None
    said: str
    zero_snr: bool = False

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """The settings that a scheduler needs for it, as diffusers' documentation advises."""
        changes: dict[str, Any] = {} if self.kind is None else {"prediction_type": self.kind}
        return changes | ({"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if self.zero_snr else {})

    def __str__(self) -> str:
        if self.kind is None:
            return (
                f"{self.said}, which is neither epsilon nor v and is not followed; name a folder with its scheduler with --config"
            )
        what = "v" if self.kind == "v_prediction" else "the noise"
        noise = f", trained with noise up to a signal of zero ({_ZERO_SNR})" if self.zero_snr else ""
        return f"its UNet predicts {what} ({self.said}){noise}"


def read_prediction(path: Path) -> Prediction | None:
    """The prediction type that a file names; None where it names none. Raises TuningError where the file cannot be read."""
    names, header = names_in(path), metadata_of(path)
    if _V in names:
        return Prediction("v_prediction", f"it has a tensor {_V}", _ZERO_SNR in names)
    for setting in _SETTINGS:
        if word := header.get(setting, "").strip():
            kind = _WORDS.get(word.lower())
            said = f"{setting} in its header is {word!r:.40}"
            return Prediction(kind, said, kind == "v_prediction" and _ZERO_SNR in names)
    return None
