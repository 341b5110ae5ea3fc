"""Pictures of lines as .tar files in webdataset's form: a PNG, its prompt and what it was made from, with one name.

A shard has the pictures of a range of lines. While they are made they lie in a hidden folder beside it, as they would without
shards; when all of the range is done, the shard is written whole, and the folder goes.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from engines.support.files import atomic_file, remove_partials, write_text
from serving.errors import ServingError

__all__ = ["Shards"]

_SETTINGS = "shards.json"


@dataclass(frozen=True)
class Shards:
    """The shards in a folder; each has the pictures of ``size`` lines."""

    folder: Path
    size: int

    def check_size(self) -> None:
        """Note the size of shards in the folder; raises ServingError where there are some of another size."""
        settings = self.folder / _SETTINGS
        found = json.loads(settings.read_text())["lines"] if settings.exists() else self.size
        if found != self.size:
            raise ServingError(f"{self.folder!s:.200} has shards of {found} lines; give --shard-size {found}, or another folder")
        if not settings.exists():
            write_text(settings, json.dumps({"lines": self.size}))

    def number_of(self, line: int) -> int:
        """The shard that a line belongs to."""
        return (line - 1) // self.size

    def path(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"shard-{shard:06}.tar"

    def pictures(self, shard: int) -> Path:
        """The hidden folder of a shard's pictures."""
        return self.folder / f".shard-{shard:06}"

    def open(self, shard: int) -> Path:
        """The hidden folder, with the pictures that the shard has if it was written before."""
        folder = self.pictures(shard)
        folder.mkdir(parents=True, exist_ok=True)
        if self.path(shard).exists():
            with tarfile.open(self.path(shard)) as archive:
                for member in archive:
                    data = archive.extractfile(member)
                    place = folder / Path(member.name).name
                    # What is in the folder was made later.
                    if data is not None and place.suffix == ".png" and not place.exists():
                        with atomic_file(place) as temporary:
                            temporary.write_bytes(data.read())
        return folder

    def close(self, shard: int, wanted: Iterable[Path], *, changed: bool) -> None:
        """Write a shard of those pictures that are wanted, if anything changed, and remove its hidden folder."""
        if changed or not self.path(shard).exists():
            paths = [path for path in wanted if path.exists()]
            if paths:
                self._write(self.path(shard), paths)
        shutil.rmtree(self.pictures(shard))

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


def _add(archive: tarfile.TarFile, path: Path, data: bytes) -> None:
    """Add a member with no date and owner, so that the same pictures make the same file."""
    member = tarfile.TarInfo(path.name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
