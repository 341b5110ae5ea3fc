"""Pictures of lines as .tar files in webdataset's form: a PNG, its prompt and what it was made from, with one name.

A shard has the pictures of a range of lines. While they are made they lie in a hidden folder beside it, as they would without
shards; when all of the range is done, the shard is written whole, and the folder goes.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image
from pydantic import ValidationError

from engines.support.files import atomic_file, remove_partials, write_text
from engines.support.records import Record, explain
from serving.errors import ServingError
from serving.prompts.folder import mark_in

__all__ = ["Shards"]

_SETTINGS = "shards.json"


class _Settings(Record):
    """The settings that a folder of shards was begun with."""

    lines: int


@dataclass(frozen=True)
class Shards:
    """The shards in a folder; each has the pictures of ``size`` lines."""

    folder: Path
    size: int

    def check_size(self) -> None:
        """Note the size of shards in the folder; raises ServingError where there are some of another size."""
        settings = self.folder / _SETTINGS
        if not settings.exists():
            write_text(settings, _Settings(lines=self.size).model_dump_json())
        try:
            found = _Settings.model_validate_json(settings.read_bytes()).lines
        except ValidationError as error:
            raise ServingError(f"{settings!s:.200} is damaged ({explain(error)}); remove it, or give another folder") from error
        if found != self.size:
            raise ServingError(f"{self.folder!s:.200} has shards of {found} lines; give --shard-size {found}, or another folder")

    def number_of(self, line: int) -> int:
        """The shard that a line belongs to."""
        return (line - 1) // self.size

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"shard-{shard:06}.tar"

    def pictures(self, shard: int) -> Path:
        """The hidden folder of a shard's pictures."""
        return self.folder / f".shard-{shard:06}"

    def marks(self, shard: int) -> dict[str, str]:
        """Of each picture in a shard that was written before, by its file's name, the mark of the line that it was made from.

        A shard that is damaged is as good as none.
        """
        if not self.path(shard).exists():
            return {}
        try:
            with tarfile.open(self.path(shard), "r:") as archive:
                return {name: mark for name, data in _pictures_in(archive) if (mark := mark_in(data)) is not None}
        except tarfile.TarError:
            self.path(shard).unlink()
            return {}

    def close(self, shard: int, wanted: Iterable[Path], *, changed: bool) -> None:
        """Write a shard of those pictures that are wanted, if anything changed, and remove its hidden folder."""
        if changed:
            folder = self.pictures(shard)
            folder.mkdir(parents=True, exist_ok=True)
            self._unpack(shard, folder)
            if paths := [path for path in wanted if path.exists()]:
                self._write(self.path(shard), paths)
        shutil.rmtree(self.pictures(shard), ignore_errors=True)

    def _unpack(self, shard: int, folder: Path) -> None:
        """Put a shard's pictures beside those that were made since; what is there was made later."""
        if not self.path(shard).exists():
            return
        with tarfile.open(self.path(shard), "r:") as archive:
            for name, data in _pictures_in(archive):
                if not (folder / name).exists():
                    with atomic_file(folder / name) as temporary:
                        temporary.write_bytes(data.read())

    @staticmethod
    def _write(target: Path, paths: Iterable[Path]) -> None:
        remove_partials(target)
        with atomic_file(target) as temporary, tarfile.open(temporary, "w") as archive:
            for path in paths:
                with Image.open(path) as image:
                    told = {name: value for name, value in image.info.items() if isinstance(value, str)}
                _add(archive, path.with_suffix(".json"), json.dumps(told).encode())
                _add(archive, path, path.read_bytes())
                _add(archive, path.with_suffix(".txt"), told.get("prompt", "").encode())


def _pictures_in(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """The pictures of a shard, by name; their bytes are read as they are asked for."""
    for member in archive:
        data, name = archive.extractfile(member), Path(member.name).name
        if data is not None and name.endswith(".png"):
            yield name, data


def _add(archive: tarfile.TarFile, path: Path, data: bytes) -> None:
    """Add a member with no date and owner, so that the same pictures make the same file."""
    member = tarfile.TarInfo(path.name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
