"""Graphs as ONNX Runtime optimises them for this processor, kept for the next start.

Optimising lays the weights of convolutions out anew, which at full size takes more time than all else of a start. An entry of the
cache has the optimised graph, and the weights that optimising made, which are mapped into memory as they lie. All other weights
stay in the bundle's own file. An entry belongs to files by their hashes, to a processor, a version and the options; it is used if
it has the hashes that were noted when it was made, and made anew if not.
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from pydantic import Field

from engines.bundle.digests import known_sha256, note_sha256
from engines.support.caches import user_cache
from engines.support.files import atomic_directory, write_text
from engines.support.records import Record

__all__ = ["OptimizedGraph"]

_FORM = 1
"""Of an entry, and of the options that decide what optimising does; another number for another form."""
_LEAST_FILES, _LEAST_MADE = 64 * 2**20, 32 * 2**20
"""Bytes of a segment's files, and of weights that optimising makes, from which on an entry pays."""
_INLINE = 1024
"""Bytes. Smaller weights stay in the graph's file."""
_ALIGNMENT = 4096
_GIB = 8.0
_LIMIT = "UNET_HEIRLOOM_GRAPHS_GIB"
"""The environment variable for the GiB that all entries together may take: ``_GIB`` if not set; with 0 no graph is kept."""
_GRAPH, _WEIGHTS, _ENTRY, _ALL = "graph.onnx", "weights.data", "entry.json", "all.data"


class _Tensor(Record):
    """A tensor in the file of weights: its type in NumPy's words, its shape, and its first byte."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class _Entry(Record):
    """The contents of an entry. It has no graph where one does not pay, or where ONNX Runtime refuses the one that it wrote."""

    graph_sha256: str = ""
    weights_sha256: str = ""
    tensors: dict[str, _Tensor] = Field(default_factory=dict)


class OptimizedGraph:
    """The entry of one segment's optimised graph in the user's cache.

    Args:
        ort: the module onnxruntime.
        path: the segment's ONNX file, checked; its weights are in the same folder.
        hashes: of this file and of those of its weights.
    """

    def __init__(self, ort: Any, path: Path, hashes: Sequence[str]) -> None:
        self._ort, self._path = ort, path
        made_from = [_FORM, ort.__version__, _processor(), *hashes]
        self._folder = _root() / sha256(json.dumps(made_from).encode()).hexdigest()[:32]

    @staticmethod
    def pays(size: int) -> bool:
        """Whether graphs of segments whose files have so many bytes are kept at all."""
        return _LEAST_FILES <= size <= _limit()

    def session(self, options: Any) -> Any | None:
        """A session on what is kept, which computes the same to the last bit; None where nothing is, or nothing that is whole.

        Args:
            options: the session's, which are changed.
        """
        try:
            entry = _read_entry(self._folder)
            if not entry.graph_sha256:
                return None
            graph = (self._folder / _GRAPH).read_bytes()
            whole = sha256(graph).hexdigest() == entry.graph_sha256
            if not whole or known_sha256(self._folder / _WEIGHTS) != entry.weights_sha256:
                raise ValueError("damaged")
            weights = _map(self._folder / _WEIGHTS, entry.tensors)
            os.utime(self._folder / _ENTRY)  # used last: others go first
        except (OSError, ValueError):  # it is not there, or not whole
            shutil.rmtree(self._folder, ignore_errors=True)
            return None
        return self._loaded(graph, weights, options)

    def _loaded(self, graph: bytes, weights: Mapping[str, Any], options: Any) -> Any | None:
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._path.parent))
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in weights.items()}
        try:
            for name, value in values.items():
                options.add_initializer(name, value)
            session = self._ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception:  # of no base class: what it wrote itself it does not take, and would not take the next time
            shutil.rmtree(self._folder, ignore_errors=True)
            _write_entry(self._folder, _Entry())
            return None
        session.kept = values, weights  # it reads their memory
        return session

    def made(self, options: Any, size: int) -> Any | None:
        """A session on the segment's own file, whose optimised graph is kept; None where it cannot be, or need not.

        Args:
            options: the session's, which are changed.
            size: bytes of the segment's files; while an entry is made, twice as many are needed on the disk.
        """
        try:
            with _alone() as root:
                if (self._folder / _ENTRY).exists() or shutil.disk_usage(root).free < 3 * size:
                    return None
                with atomic_directory(self._folder) as folder:
                    session = self._optimized(folder, options)
                    _write_entry(folder, _compact(folder, self._path))
                if (self._folder / _WEIGHTS).exists():
                    note_sha256(self._folder / _WEIGHTS, _read_entry(self._folder).weights_sha256, settled=True)
                _prune(root, self._folder)
        except (OSError, Timeout):  # the disk is full, or another process is at it
            return None
        return session

    def _optimized(self, folder: Path, options: Any) -> Any:
        """A session that has written its graph and all its weights; raises OSError where it cannot write."""
        options.optimized_model_filepath = str(folder / _GRAPH)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _ALL)
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", str(_INLINE))
        try:
            return self._ort.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of no base class; what is wrong with the segment itself is said when it is loaded as it is
            raise OSError(str(error)) from error


def _compact(folder: Path, path: Path) -> _Entry:
    """Turn what ONNX Runtime wrote into an entry: weights that are the original's are read from the original's file.

    Args:
        folder: has the optimised graph, and all its weights in one file, which is removed.
        path: the original.
    """
    import onnx

    graph, original = (onnx.load(file, load_external_data=False) for file in (folder / _GRAPH, path))
    known = {tensor.name: tensor for tensor in original.graph.initializer if tensor.external_data}
    files = {name: np.memmap(path.with_name(name), np.uint8, "r") for name in {_where(tensor)[0] for tensor in known.values()}}
    every = np.memmap(folder / _ALL, np.uint8, "r")
    tensors: dict[str, _Tensor] = {}
    digest, end = sha256(), 0
    with (folder / _WEIGHTS).open("wb") as stream:
        for tensor in [tensor for tensor in graph.graph.initializer if tensor.external_data]:
            _, start, length = _where(tensor)
            data = every[start : start + length]
            same = _where(known[tensor.name]) if tensor.name in known else ("", 0, 0)
            if same[2] == length and np.array_equal(data, files[same[0]][same[1] : same[1] + length]):
                _refer(tensor, *same)
                continue
            # A location that exists has to stand in the graph; the tensor that is given to the session replaces it.
            largest = max(files, key=lambda name: len(files[name]), default="")
            if not largest or length > len(files[largest]):
                return _nothing(folder)
            _refer(tensor, largest, 0, length)
            gap = bytes(-end % _ALIGNMENT)
            tensors[tensor.name] = _Tensor(
                dtype=str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)), shape=tuple(tensor.dims), offset=end + len(gap)
            )
            for part in (gap, data.data):
                stream.write(part)
                digest.update(part)
            end += len(gap) + length
    del every
    content = graph.SerializeToString()
    if end < _LEAST_MADE or _ALL.encode() in content:
        return _nothing(folder)
    (folder / _ALL).unlink()
    (folder / _GRAPH).write_bytes(content)
    return _Entry(graph_sha256=sha256(content).hexdigest(), weights_sha256=digest.hexdigest(), tensors=tensors)


def _nothing(folder: Path) -> _Entry:
    """The entry of a segment that is not kept."""
    for name in (_GRAPH, _WEIGHTS, _ALL):
        (folder / name).unlink(missing_ok=True)
    return _Entry()


def _where(tensor: Any) -> tuple[str, int, int]:
    """File, first byte and length of a tensor that an ONNX file has outside."""
    found = {entry.key: entry.value for entry in tensor.external_data}
    return found["location"], int(found.get("offset", 0)), int(found.get("length", 0))


def _refer(tensor: Any, location: str, offset: int, length: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _map(path: Path, tensors: Mapping[str, _Tensor]) -> dict[str, Any]:
    """The tensors in a file of weights, as they lie; raises ValueError where they do not lie in it."""
    data = np.memmap(path, np.uint8, "r")
    return {name: np.ndarray(each.shape, np.dtype(each.dtype), data, each.offset) for name, each in tensors.items()}


def _read_entry(folder: Path) -> _Entry:
    """The entry in a folder; raises OSError or ValueError."""
    digest, _, text = (folder / _ENTRY).read_text("utf-8").partition("\n")
    if sha256(text.encode()).hexdigest() != digest:
        raise ValueError("damaged")
    return _Entry.model_validate_json(text)


def _write_entry(folder: Path, entry: _Entry) -> None:
    text = entry.model_dump_json()
    with suppress(OSError):
        write_text(folder / _ENTRY, f"{sha256(text.encode()).hexdigest()}\n{text}")


def _root() -> Path:
    return user_cache() / "onnxruntime"


def _limit() -> float:
    """Bytes that all entries together may take."""
    try:
        return float(os.environ.get(_LIMIT, _GIB)) * 2**30
    except ValueError:
        return _GIB * 2**30


@contextmanager
def _alone() -> Iterator[Path]:
    """The cache's folder, in which no other process makes an entry; raises Timeout where one does, or OSError."""
    root = _root()
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock", timeout=0):
        for left in root.glob(".*.partial*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        yield root


def _prune(root: Path, keep: Path) -> None:
    """Remove the entries that were used longest ago, until all together are within the limit."""
    found = sorted((path / _ENTRY for path in root.iterdir() if (path / _ENTRY).is_file()), key=lambda path: path.stat().st_mtime)
    sizes = {entry.parent: sum(path.stat().st_size for path in entry.parent.iterdir()) for entry in found}
    for folder in sizes:
        if sum(sizes.values()) > _limit() and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
            sizes[folder] = 0


@cache
def _processor() -> str:
    """The kind of processor and what it can do."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        return " ".join([platform.machine(), *next(([line] for line in lines if line.startswith(("flags", "Features"))), [])])
    return f"{platform.machine()} {platform.processor()}"
