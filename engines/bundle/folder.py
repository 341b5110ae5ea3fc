"""A bundle on disk: read it, check it, hash its files."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from pydantic import ValidationError

from engines.bundle.checks import LARGEST_MANIFEST, ManifestError, check_complete, check_manifest
from engines.bundle.damage import damaged, of_another_version
from engines.bundle.digests import Digest, fresh_sha256, known_sha256, sha256
from engines.bundle.manifest import MANIFEST_VERSION, File, Manifest
from engines.errors import BundleError
from engines.support.files import exists, is_file
from engines.support.records import explain, one_line

__all__ = ["MANIFEST_NAME", "Bundle", "Digest", "describe_file", "is_intact", "sha256"]

MANIFEST_NAME = "manifest.json"


def describe_file(folder: Path, path: Path) -> File:
    """The manifest's record of a file inside ``folder``."""
    return File(path=path.relative_to(folder).as_posix(), sha256=sha256(path), bytes=path.stat().st_size)


def is_intact(folder: Path, file: File, digest: Digest = sha256) -> bool:
    """Whether a file is there and is the one that the record describes."""
    path = folder / file.path
    if not is_file(path) or path.stat().st_size != file.bytes:
        return False
    # What is remembered may be damaged, which says nothing of the file.
    return digest(path) == file.sha256 or (digest is known_sha256 and fresh_sha256(path) == file.sha256)


@dataclass(frozen=True)
class Bundle:
    """A folder and the manifest read from it."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> "Bundle":
        """Read a bundle's manifest; files are checked when they are loaded (``path``) or all at once (``check``).

        Raises:
            BundleError: there is no bundle, its manifest cannot be read, or it is of another version.
        """
        folder = Path(folder)
        path = folder / MANIFEST_NAME
        if not is_file(path):
            reason = f"no {MANIFEST_NAME} in it" if exists(folder) else "no such folder"
            error = BundleError(f"no bundle at {folder} ({reason})")
            error.add_note(f"make one with: python -m exporter build --variant assembled --out {quote(str(folder))}")
            raise error
        _check_inside(folder, path)
        try:
            data = _parsed(path)
            version = data.get("version") if isinstance(data, dict) else None
            if version != MANIFEST_VERSION:
                raise of_another_version(folder, one_line(version, 20), MANIFEST_VERSION)
            manifest = Manifest.model_validate(data)
            check_manifest(manifest)
        except ValidationError as error:
            raise damaged(folder, f"{MANIFEST_NAME}, {explain(error)}") from error
        except ManifestError as error:
            raise damaged(folder, f"{MANIFEST_NAME}, {error}") from error
        return cls(folder, manifest)

    def check_complete(self) -> None:
        """Raise BundleError unless the bundle has all that making pictures takes: text encoder, UNet and VAE decoder."""
        try:
            check_complete(self.manifest)
        except ManifestError as error:
            raise damaged(self.folder, f"{MANIFEST_NAME}, {error}") from error

    @contextmanager
    def settings(self) -> Iterator[Path]:
        """A temporary folder with the tokenizer's and the scheduler's files that the manifest lists, and nothing else.

        Libraries read every file that they know from a folder: what was put beside the listed ones does not exist for them.

        Raises:
            BundleError: a file is missing or damaged.
        """
        with TemporaryDirectory(prefix="unet-heirloom-") as temporary:
            for file in self.manifest.files:
                target = Path(temporary) / file.path
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path(file), target)
            yield Path(temporary)

    def path(self, file: File, digest: Digest = known_sha256) -> Path:
        """The absolute path of a file, after checking that it is whole; ``digest`` tells its SHA-256.

        A large file that was read before is known by its times: ``check`` reads all of them.

        Raises:
            BundleError: the file is missing or its hash differs from the manifest's.
        """
        path = self.folder / file.path
        if not is_file(path):
            raise damaged(self.folder, f"{file.path} is missing")
        _check_inside(self.folder, path)
        if not is_intact(self.folder, file, digest):
            raise damaged(self.folder, f"{file.path} is not the file that was built")
        return path

    def rebuild_command(self, engine: str = "onnxruntime") -> str:
        """The command that builds the bundle again at its path, for an engine beside those that it has."""
        return f"{self.manifest.whole_build_command(engine)} --force --out {quote(str(self.folder))}"

    def check(self, digest: Digest = fresh_sha256) -> None:
        """Read and check every file of the bundle; raises BundleError as ``path`` does."""
        for file in self.manifest.all_files:
            self.path(file, digest)

    def copy_to(self, target: Path) -> None:
        """Copy the manifest and the files that it names, and nothing else that lies beside them, into a folder; unchecked."""
        for name in (MANIFEST_NAME, *(file.path for file in self.manifest.all_files)):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / name, target / name)


def _check_inside(folder: Path, path: Path) -> None:
    """Raise BundleError where a link leads out of the bundle, but for the hub's cache: there all files are links to its blobs."""
    real, inside = path.resolve(), [folder.resolve()]
    snapshots = next((parent for parent in folder.absolute().parents if parent.name == "snapshots"), None)
    if snapshots is not None:
        inside.append((snapshots.parent / "blobs").resolve())
    if not any(real.is_relative_to(root) for root in inside):
        raise BundleError(
            f"bundle {folder}: {path.relative_to(folder)} is a link that leads out of the bundle; put the file in its place"
        )


def _parsed(path: Path) -> Any:
    """The manifest's JSON, whose size and depth are bounded; raises BundleError."""
    folder = path.parent
    if path.stat().st_size > LARGEST_MANIFEST:
        raise damaged(folder, f"{MANIFEST_NAME} has more than {LARGEST_MANIFEST} bytes")
    try:
        data = json.loads(path.read_text("utf-8"), parse_constant=_refuse)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # text that is half a character cannot be written
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or a number of thousands of digits
        reason = str(error).splitlines()[0]
        raise damaged(folder, f"{MANIFEST_NAME} is no JSON ({reason})") from error
    return data


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
