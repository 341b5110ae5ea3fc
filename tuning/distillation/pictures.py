"""Pictures with captions, read through `datasets`: a folder with metadata.jsonl (columns file_name and text), or .tar shards.

Shards are webdataset's: KEY.jpg, .jpeg, .png or .webp beside KEY.txt. `datasets` keeps an index of either in its cache, and
of shards a copy of the pictures.
"""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engines.support.pictures import PictureError, open_picture, to_rgb
from tuning.errors import TuningError
from tuning.training.extras import need

__all__ = ["Pictures"]

_KINDS = ("jpg", "jpeg", "png", "webp")
_METADATA = "metadata.jsonl"


class Pictures:
    """The pictures and captions of a folder or of one .tar file. Pictures are opened when they are asked for.

    Raises TuningError when there are none, or when one has no caption, or one that is no text.
    """

    captions: list[str]

    def __init__(self, path: Path) -> None:
        shards = _shards(path)
        self._rows = _load("webdataset", path, data_files=shards) if shards else _folder(path)
        names = self._rows.column_names
        self._column = next((name for name in (*_KINDS, "image") if name in names), "image")
        text = "txt" if shards else "text"
        if self._column not in names or text not in names:
            wanted = f"KEY.txt beside each KEY.{'|'.join(_KINDS)}" if shards else f"the columns file_name and text in {_METADATA}"
            raise TuningError(f"data {path}: no captions, only {', '.join(n for n in names if n[:2] != '__')}; write {wanted}")
        self._path = path
        self.captions = [self._caption(i, caption) for i, caption in enumerate(self._rows[text])]

    def _caption(self, number: int, caption: Any) -> str:
        """A row's caption, which must be text."""
        if isinstance(caption, str) and caption.strip():
            return caption
        blank = caption is None or isinstance(caption, str)
        found = "no caption" if blank else f"a caption that is no text ({caption!r:.40})"
        raise TuningError(f"data {self._path}: {self._name(self._rows[number])} has {found}; write one or take the picture out")

    def _name(self, row: dict[str, Any]) -> str:
        """The name of a row's picture, for errors."""
        return str(row[self._column].get("path") or row.get("__key__")) if row[self._column] else str(row.get("__key__"))

    def read(self, numbers: list[int], size: int) -> Tensor:
        """(n, 3, size, size) in [-1, 1]: the shorter side scaled to `size`, the middle of the longer one.

        Raises TuningError, naming the file, for a picture that can't be read.
        """
        return torch.stack([self._one(number, size) for number in numbers])

    def _one(self, number: int, size: int) -> Tensor:
        row = self._rows[number]
        held = row[self._column] or {}
        try:
            picture = to_rgb(open_picture(io.BytesIO(held["bytes"]) if held["bytes"] else held["path"]))
        except (PictureError, KeyError, TypeError) as error:
            reason = error if isinstance(error, PictureError) else "it is missing"
            raise TuningError(
                f"data {self._path}: {self._name(row)} cannot be read as a picture ({reason}); "
                "replace it or take it out, and start again"
            ) from error
        fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.asarray(fitted, np.float32)).permute(2, 0, 1) / 127.5 - 1


def _shards(path: Path) -> list[str]:
    """The .tar files that are meant."""
    if path.is_file() and path.suffix == ".tar":
        return [str(path)]
    if not path.is_dir():
        what = "is a file of another kind than .tar" if path.exists() else "no such folder"
        raise TuningError(f"data {path}: {what}; give mini, a folder of pictures with {_METADATA}, .tar shards, or latents")
    if not any(path.iterdir()):
        raise TuningError(f"data {path} is empty; put pictures and a {_METADATA} there, or .tar shards")
    return [] if (path / _METADATA).is_file() else sorted(str(file) for file in path.glob("*.tar"))


def _folder(path: Path) -> Any:
    if not (path / _METADATA).is_file():
        raise TuningError(
            f"data {path}: {_METADATA} is missing; write one with a line "
            '{"file_name": "a.png", "text": "what it shows"} per picture'
        )
    if not (path / _METADATA).read_bytes().strip():
        raise TuningError(f"data {path / _METADATA} is empty; write a line for each picture")
    # Every file: `datasets` would take one called bullet-train.png or test-tube.png for a split of its own.
    return _load("imagefolder", path, data_dir=str(path), data_files={"train": "**"})


def _damaged(shards: list[str], path: Path, reason: str) -> tuple[str | Path, str]:
    """The first shard that is no whole .tar or holds nothing, and what is wrong with it; else what all are of."""
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                sizes = [len(tar.extractfile(member).read()) for member in tar if member.isfile()]  # type: ignore[union-attr]
        except (OSError, tarfile.TarError):
            return shard, reason
        if not sizes:
            return shard, "it holds no files"
    return path, reason


def _load(kind: str, path: Path, **where: Any) -> Any:
    """The rows as `datasets` finds them, pictures undecoded."""
    need("datasets", "reading pictures")
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(kind, split="train", **where)
        for name in (*_KINDS, "image"):
            if name in rows.column_names:
                rows = rows.cast_column(name, datasets.Image(decode=False))
    except Exception as error:  # of many kinds, from pyarrow, tarfile and datasets
        cause = error.__cause__ or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        file: str | Path = path / _METADATA
        if kind == "webdataset":
            file, reason = _damaged(where["data_files"], path, reason)
        raise TuningError(f"data {file} cannot be read ({reason}); repair it or take it out") from error
    return rows
