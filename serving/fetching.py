"""Bundles that lie elsewhere, brought to this machine once: an archive at an address, or a folder on a shared disk."""

import hashlib
import logging
import shutil
import tarfile
import zlib
from collections.abc import Callable
from io import BufferedRandom
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock

from engines import Bundle, UserError
from engines.bundle.folder import MANIFEST_NAME, sha256
from engines.support.caches import user_cache
from engines.support.files import atomic_directory, expanded
from serving.errors import ServingError

__all__ = ["COPY", "bundle_folder"]

_LOG = logging.getLogger(__name__)
COPY = "copy:"
"""Before a folder: copy it to this machine's disk, and use the copy."""
_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_HASH = "#sha256="


def bundle_folder(source: str) -> Path:
    """The folder on this machine of a bundle.

    Args:
        source: a folder, which is used where it is; ``copy:FOLDER``; or an archive, ``.tar`` or ``.tar.gz``, at a path or an
            address that fsspec knows (``https://``, ``s3://``), with ``#sha256=HEX`` behind it if it is to be that one. What is
            brought here lies with the user's caches, all of its files compared with the manifest's hashes, and stays for the
            next time: another archive at the same address is not noticed without its hash.

    Raises:
        ServingError: it cannot be brought here, or is another archive than the one asked for.
        BundleError: there is no bundle, or it is damaged.
    """
    if source.startswith(COPY):
        return _copied(expanded(source.removeprefix(COPY)))
    address, _, wanted = source.partition(_HASH)
    if not address.endswith(_SUFFIXES):
        return expanded(source)
    return _once(hashlib.sha256(source.encode()).hexdigest()[:32], lambda target: _unpack(address, wanted, target))


def _copied(folder: Path) -> Path:
    bundle = Bundle.open(folder)
    return _once(sha256(folder / MANIFEST_NAME)[:32], bundle.copy_to)


def _once(key: str, fill: Callable[[Path], object]) -> Path:
    """A folder of the cache, filled by whoever comes first; others wait for that."""
    folder = user_cache() / "fetched" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            with atomic_directory(folder) as temporary:
                fill(temporary)
                Bundle.open(temporary).check()
            _LOG.info("a bundle was brought to %s", folder)
    return folder


def _unpack(address: str, wanted: str, target: Path) -> None:
    import fsspec

    try:
        with fsspec.open(address, "rb") as source, TemporaryFile() as file:
            shutil.copyfileobj(source, file, 2**20)
            _check_hash(file, address, wanted)
            with tarfile.open(fileobj=file) as archive:
                archive.extractall(target, filter="data")
    except UserError:
        raise
    except (OSError, EOFError, ImportError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ServingError(f"{address:.200} cannot be brought here ({error!s:.200}); give another one") from error
    _lift(target)


def _check_hash(file: BufferedRandom, address: str, wanted: str) -> None:
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted and found != wanted.lower():
        raise ServingError(f"{address:.200} has the SHA-256 {found}, and not {wanted:.70}; it is another archive, or damaged")
    file.seek(0)


def _lift(target: Path) -> None:
    """Archives often hold one folder with all in it: its files are put where the bundle is to be."""
    inside = list(target.iterdir())
    if len(inside) == 1 and inside[0].is_dir():
        for path in list(inside[0].iterdir()):
            path.rename(target / path.name)
        inside[0].rmdir()
