"""The parts that bundles share which run together: text encoder, VAE and tokenizer, told apart by hashes, not by names."""

from engines.bundle.manifest import File, Manifest
from engines.bundle.names import TEXT, VAE_DECODER, VAE_ENCODER

__all__ = ["shared_difference"]

_WORDS = {TEXT: "text encoder", VAE_DECODER: "VAE", VAE_ENCODER: "VAE"}


def shared_difference(one: Manifest, other: Manifest) -> str | None:
    """Which part is not the same in both, in words; None where all are. A VAE encoder that one has not is no difference."""
    for name, words in _WORDS.items():
        here, there = _weights(one, name), _weights(other, name)
        if here and there and here != there:
            return words
    return "tokenizer" if _tokenizer(one) != _tokenizer(other) else None


def _weights(manifest: Manifest, unit: str) -> frozenset[str]:
    """Hashes of the weights of a unit's segment. Graphs are left out: PyTorch numbers their values differently each time."""
    files: list[File] = [file for segment in manifest.segments if unit in segment.units for file in segment.onnx]
    return frozenset(file.sha256 for file in files if file.path.endswith(".data"))


def _tokenizer(manifest: Manifest) -> dict[str, str]:
    return {file.path: file.sha256 for file in manifest.files if file.path.startswith("tokenizer/")}
