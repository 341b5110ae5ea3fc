"""Training examples from a folder: pictures with captions, or latents computed before, in seeded passes over all of them."""

from collections.abc import Callable

import torch
from torch import Tensor

from engines.bundle.shapes import size_fault
from engines.support.files import expanded
from tuning.distillation.latents import MANIFEST, LatentFolder
from tuning.distillation.pictures import Pictures
from tuning.errors import TuningError
from tuning.training.distributed import Workers
from tuning.training.noising import generator
from tuning.training.teacher import Teacher

__all__ = ["Passes", "check_size", "open_examples"]

Read = Callable[[list[int]], tuple[Tensor, Tensor]]


class Passes:
    """Reads `count` examples again and again, each pass in an order of its own that follows from the seed.

    Examples are numbered over the batches of all processes, so that two processes see what one sees in batches twice as
    large. One in ten, at most `validation`, is held back.
    """

    def __init__(
        self, read: Read, count: int, workers: Workers, *, batch: int, validation: int, seed: int, name: str = "the data"
    ) -> None:
        """`read` gives latents (n, c, h, w) and ids (n, length). Raises TuningError when there are not two examples."""
        if count < 2:
            raise TuningError(f"{name} holds {count} example{'' if count == 1 else 's'}; training and validation need one each")
        held = min(validation, max(1, count // 10))
        order = torch.randperm(count, generator=generator(seed, 0)).tolist()
        self._read, self._workers, self._batch, self._seed = read, workers, batch, seed
        self._held, self._rest = order[:held], order[held:]
        self._pass: tuple[int, list[int]] = (-1, [])
        self._kept: tuple[Tensor, Tensor] | None = None

    def _example(self, number: int) -> int:
        """Which example has this number in the endless sequence."""
        turn, place = divmod(number, len(self._rest))
        if self._pass[0] != turn:
            self._pass = (turn, torch.randperm(len(self._rest), generator=generator(self._seed, turn + 1)).tolist())
        return int(self._rest[self._pass[1][place]])

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents and ids of this process at `step`."""
        at = (step * self._workers.count + self._workers.rank) * self._batch
        return self._read([self._example(at + i) for i in range(self._batch)])

    def validation(self) -> tuple[Tensor, Tensor]:
        """Latents and ids of the examples held back."""
        if self._kept is None:
            parts = [self._read(self._held[at : at + self._batch]) for at in range(0, len(self._held), self._batch)]
            self._kept = (torch.cat([latents for latents, _ in parts]), torch.cat([tokens for _, tokens in parts]))
        return self._kept


def check_size(teacher: Teacher, size: int | None) -> int:
    """The side of training pictures in pixels. Raises TuningError for one that the UNet can't halve often enough."""
    wanted = size or teacher.size
    step = teacher.scale << (len(teacher.unet.config.block_out_channels) - 1)
    if fault := size_fault((wanted, wanted), step):
        raise TuningError(f"--size {fault}")
    return wanted


def open_examples(
    data: str, teacher: Teacher, workers: Workers, *, size: int | None, batch: int, validation: int, seed: int
) -> tuple[Passes, int]:
    """The examples of a folder or a .tar, and the side of its pictures in pixels.

    Raises TuningError for a folder that is missing, empty or without captions, and for latents of another model.
    """
    path = expanded(data)
    read: Read
    if (path / MANIFEST).is_file():
        latents = LatentFolder(path, teacher)
        if size not in (None, latents.size):
            raise TuningError(f"--size {size}: the latents in {path} are of pictures of {latents.size} pixels; leave --size out")
        read, count, side = latents.read, len(latents), latents.size
    else:
        pictures, side = Pictures(path), check_size(teacher, size)

        def encoded(numbers: list[int]) -> tuple[Tensor, Tensor]:
            batch = pictures.read(numbers, side).to(workers.device, memory_format=torch.channels_last)
            return teacher.encode(batch).cpu(), teacher.ids([pictures.captions[i] for i in numbers])

        read, count = encoded, len(pictures.captions)
    return Passes(read, count, workers, batch=batch, validation=validation, seed=seed, name=f"data {path}"), side
