"""A bundle on disk: read it, check it, hash its files."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from pydantic import ValidationError

from engines.bundle.manifest import MANIFEST_VERSION, File, Manifest
from engines.errors import BundleError
from engines.support.records import explain

__all__ = ["MANIFEST_NAME", "Bundle", "describe_file", "is_intact", "sha256"]

MANIFEST_NAME = "manifest.json"

Digest = Callable[[Path], str]
"""SHA-256 of a file, in hexadecimal."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def describe_file(folder: Path, path: Path) -> File:
    """The manifest's record of a file inside ``folder``."""
    return File(path=path.relative_to(folder).as_posix(), sha256=sha256(path), bytes=path.stat().st_size)


def is_intact(folder: Path, file: File, digest: Digest = sha256) -> bool:
    """Whether a file is there and is the one that the record describes."""
    path = folder / file.path
    return path.is_file() and path.stat().st_size == file.bytes and digest(path) == file.sha256


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
        if not path.is_file():
            reason = "no such folder" if not folder.exists() else f"no {MANIFEST_NAME} in it"
            raise BundleError(
                f"no bundle at {folder} ({reason}); make one with: python -m exporter build --variant assembled --out {folder}"
            )
        try:
            data = json.loads(path.read_text("utf-8"))
            version = data.get("version") if isinstance(data, dict) else None
            if version != MANIFEST_VERSION:
                raise BundleError(
                    f"bundle {folder} has manifest version {version}, this program reads {MANIFEST_VERSION}; {_rebuild(folder)}"
                )
            return cls(folder, Manifest.model_validate(data))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise BundleError(f"bundle {folder} is damaged: {MANIFEST_NAME} is no JSON ({error}); {_rebuild(folder)}") from error
        except ValidationError as error:
            raise BundleError(f"bundle {folder} is damaged: {MANIFEST_NAME}, {explain(error)}; {_rebuild(folder)}") from error

    def path(self, file: File, digest: Digest = sha256) -> Path:
        """The absolute path of a file, after checking that it is whole; ``digest`` tells its SHA-256.

        Raises:
            BundleError: the file is missing or its hash differs from the manifest's.
        """
        path = self.folder / file.path
        if not path.is_file():
            raise BundleError(f"bundle {self.folder} is damaged: {file.path} is missing; {_rebuild(self.folder)}")
        if not is_intact(self.folder, file, digest):
            raise BundleError(
                f"bundle {self.folder} is damaged: {file.path} is not the file that was built; {_rebuild(self.folder)}"
            )
        return path

    def rebuild_command(self, engine: str = "onnxruntime") -> str:
        """The command that builds the bundle again in its place, for an engine beside those that it has."""
        return f"{self.manifest.whole_build_command(engine)} --force --out {quote(str(self.folder))}"

    def check(self, digest: Digest = sha256) -> None:
        """Check every file of the bundle; raises BundleError as ``path`` does."""
        for file in self.manifest.all_files:
            self.path(file, digest)


def _rebuild(folder: Path) -> str:
    return f"rebuild it with: python -m exporter build --force --out {folder} and the options that it was built with"
