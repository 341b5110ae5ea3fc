"""Prompts that are longer than what the text encoder reads, in chunks of that length, and how many of these a UNet takes.

Each chunk is encoded by itself, between marks of its own, and the features stand one after another: the habit of Automatic1111's
web UI and of compel.
"""

from collections.abc import Iterable, Sequence

from engines import Engine, Manifest
from engines.bundle.names import TEXT

__all__ = ["chunk_rows", "chunks_needed", "described_tokens", "takes_chunks", "tokens_taken"]


def takes_chunks(manifest: Manifest) -> bool:
    """Whether the UNet takes text features of any length; bundles of older versions take one chunk."""
    return not isinstance(manifest.features[TEXT].shape[1], int)


def tokens_taken(manifests: Iterable[Manifest], engine: Engine) -> tuple[int, int | None]:
    """The fewest and the most tokens of text features that all of several UNets take in an engine; None for any number."""
    least, most = 1, list[int]()
    for manifest in manifests:
        length, dynamic = manifest.text_length, takes_chunks(manifest)
        if engine.has_profile or not dynamic:
            least = max(least, length)
            most.append(length * manifest.text_chunks if dynamic else length)
    return least, min(most, default=None)


def described_tokens(least: int, most: int | None) -> str:
    """``tokens_taken`` in words."""
    if most is None:
        return "tokens" if least == 1 else f"{least} or more"
    return str(most) if least == most else f"{least} to {most}"


def chunks_needed(ids: Sequence[int], length: int) -> int:
    """How many chunks of ``length`` tokens, two of them marks, hold a prompt's tokens, which have two marks of their own."""
    return max(1, -(-(len(ids) - 2) // (length - 2)))


def chunk_rows(ids: Sequence[int], length: int, chunks: int, padding: int, side: str = "right") -> list[list[int]]:
    """A prompt's tokens (with both marks) in so many chunks of ``length``, each with both marks; words left over are left out.

    What is short is filled up with ``padding`` at that ``side``, left or right.
    """
    first, *words, last = ids
    size = length - 2
    rows = [[first, *words[at * size : (at + 1) * size], last] for at in range(chunks)]
    filled = [[padding] * (length - len(row)) for row in rows]
    return [more + row if side == "left" else row + more for row, more in zip(rows, filled, strict=True)]
