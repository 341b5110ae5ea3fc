"""Pictures and captions as latents and token ids, computed once, in safetensors shards."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engines.support.files import atomic_file, write_text
from tuning.distillation.pictures import Pictures
from tuning.errors import TuningError
from tuning.training.distributed import Workers
from tuning.training.teacher import Teacher

__all__ = ["MANIFEST", "LatentFolder", "write_latents"]

MANIFEST = "latents.json"
_SHARD = 1024


def made_with(teacher: Teacher) -> str:
    """A hash of what latents and ids depend on: the autoencoder's way in, and the vocabulary."""
    digest = hashlib.sha256(json.dumps(sorted(teacher.tokenizer.get_vocab().items())).encode())
    digest.update(f"{teacher.tokenizer.model_max_length} {teacher.vae.config.scaling_factor}".encode())
    for name, value in sorted(teacher.vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class LatentFolder:
    """The latents that `python -m tuning latents` wrote, read as they are needed.

    Raises TuningError when they are unfinished, damaged or of another model.
    """

    def __init__(self, folder: Path, teacher: Teacher) -> None:
        manifest = _manifest(folder)
        if not manifest.get("finished"):
            raise TuningError(f"{folder} is unfinished; run the same python -m tuning latents again to finish it")
        if manifest["made_with"] != made_with(teacher):
            raise TuningError(
                f"{folder} was made with the autoencoder and tokenizer of {manifest['source']}, not with {teacher.name}'s; "
                f"run python -m tuning latents --source {teacher.name}"
            )
        self.size = int(manifest["size"])
        self._files = [folder / name for name in manifest["shards"]]
        self._ends: list[int] = list(accumulate(manifest["shards"].values()))
        self._open: dict[Path, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Scaled latents (n, c, h, w) float32 and ids (n, length) of the examples of these numbers."""
        latents, tokens = zip(*[self._one(number) for number in numbers], strict=True)
        return torch.cat(latents).float(), torch.cat(tokens).long()

    def _one(self, number: int) -> tuple[Tensor, Tensor]:
        shard = bisect_right(self._ends, number)
        at = number - (self._ends[shard - 1] if shard else 0)
        path = self._files[shard]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, "pt")
            file = self._open[path]
            return file.get_slice("latents")[at : at + 1], file.get_slice("tokens")[at : at + 1]
        except (OSError, SafetensorError) as error:
            raise TuningError(f"{path} cannot be read ({error}); delete it and run python -m tuning latents again") from error


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        if manifest["version"] != 1 or not isinstance(manifest["shards"], dict) or manifest["made_with"] is None:
            raise ValueError("not version 1")
        if not manifest["shards"] or not all(type(count) is int and count > 0 for count in manifest["shards"].values()):
            raise ValueError("it names no latents")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningError(f"{folder / MANIFEST} cannot be read ({error}); run python -m tuning latents again") from error
    return manifest


def write_latents(
    pictures: Pictures, teacher: Teacher, folder: Path, workers: Workers, *, data: str, size: int, batch: int,
    shard: int = _SHARD, progress: Callable[[int], None] = lambda done: None,
) -> None:  # fmt: skip
    """Encodes all pictures at `size` pixels, each process its shards; a run that was killed is resumed.

    Latents are stored in float16. `progress` hears how many pictures this process has done. Raises TuningError when the
    folder holds something else, or a picture can't be read.
    """
    count = len(pictures.captions)
    starts = {f"latents-{i:05}.safetensors": i * shard for i in range(-(-count // shard))}
    sizes = {name: min(shard, count - start) for name, start in starts.items()}
    made = {"version": 1, "source": teacher.name, "data": data, "size": size, "made_with": made_with(teacher), "shards": sizes}
    _claim(folder, made, workers)
    done = 0
    for i, (name, start) in enumerate(starts.items()):
        if i % workers.count == workers.rank:
            if not (folder / name).exists():
                _write_shard(folder / name, pictures, teacher, range(start, start + sizes[name]), size, batch, workers)
            done += sizes[name]
            progress(done)
    workers.wait()
    if workers.first:
        _write_manifest(folder, made | {"finished": True})


def _claim(folder: Path, made: dict[str, Any], workers: Workers) -> None:
    """Notes what the folder will hold, or checks that it holds that."""
    if (folder / MANIFEST).is_file():
        there = _manifest(folder)
        other = [name for name, value in made.items() if there.get(name) != value]
        if other:
            raise TuningError(f"--out {folder} holds latents with another {', '.join(other)}; choose another folder")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TuningError(f"--out {folder} exists and holds no latents; choose another folder")
    workers.wait()
    if workers.first:
        folder.mkdir(parents=True, exist_ok=True)
        _write_manifest(folder, made)
    workers.wait()


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _write_shard(
    path: Path, pictures: Pictures, teacher: Teacher, numbers: range, size: int, batch: int, workers: Workers
) -> None:
    latents = []
    for at in range(0, len(numbers), batch):
        part = pictures.read(list(numbers[at : at + batch]), size).to(workers.device, memory_format=torch.channels_last)
        latents.append(teacher.encode(part).cpu().half())
    tokens = teacher.ids([pictures.captions[number] for number in numbers]).int()
    try:
        with atomic_file(path) as partial:
            save_file({"latents": torch.cat(latents).contiguous(), "tokens": tokens}, partial)
    except (OSError, SafetensorError) as error:
        raise TuningError(f"can't write {path} ({error}); the shards before it are kept: make room, run again") from error
