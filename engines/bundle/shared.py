"""The parts that bundles share which run together, told apart by hashes: text encoder, VAE, tokenizer and scheduler."""

from engines.bundle.manifest import Manifest, Segment
from engines.bundle.names import TEXT, VAE_DECODER, VAE_ENCODER

__all__ = ["shared_difference"]

_WORDS = {TEXT: "text encoder", VAE_DECODER: "VAE", VAE_ENCODER: "VAE"}


def shared_difference(one: Manifest, other: Manifest) -> str | None:
    """Which part is not the same in both, in words; None where all are. A VAE encoder that one has not is no difference."""
    for name, words in _WORDS.items():
        segments = [segment for manifest in (one, other) for segment in manifest.segments if name in segment.units]
        if len(segments) > 1 and not _are_alike(*segments):
            return words
    return next((part for part in ("tokenizer", "scheduler") if _settings(one, part) != _settings(other, part)), None)


def _are_alike(one: Segment, other: Segment) -> bool:
    """Whether two segments have the same weights; where all of these lie in the graph, whether they were made alike.

    Graphs are not compared: PyTorch numbers their values differently each time.
    """
    here, there = ({file.sha256 for file in segment.onnx if file.path.endswith(".data")} for segment in (one, other))
    return here == there and (bool(here) or one.key == other.key)


def _settings(manifest: Manifest, part: str) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files if file.path.startswith(f"{part}/")}
