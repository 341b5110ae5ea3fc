"""Files of a checkpoint, looked at before they are read: a pipe, a Git LFS pointer or an endless JSON file is refused by name."""

import json
from pathlib import Path
from typing import Any

from tuning.errors import TuningError

__all__ = ["CONFIGURATIONS", "check_file", "read_json"]

CONFIGURATIONS = frozenset({
    "config.json", "scheduler_config.json", "tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
})  # fmt: skip
"""The files that diffusers and transformers read from the folders of a checkpoint beside weights."""
_POINTER = b"version https://git-lfs"
_LARGEST_JSON = 1 << 26
"""Bytes; the index of a large model has some 100 kB, CLIP's vocabulary 1 MB."""


def check_file(path: Path) -> None:
    """Raise TuningError unless there is a regular file that holds more than a Git LFS pointer."""
    if not path.is_file():
        what = "is no regular file" if path.exists() else "is missing"
        raise TuningError(f"{path} {what}; get it again")
    if path.stat().st_size < 1024:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise TuningError(f"{path} is a Git LFS pointer, not the file itself; fetch it with: git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TuningError as ``check_file`` does, and for anything that is no object."""
    check_file(path)
    try:
        if (size := path.stat().st_size) > _LARGEST_JSON:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError, RecursionError) as error:
        raise TuningError(f"{path} cannot be read as JSON ({str(error).splitlines()[0]}); get it again") from error
    return content
