"""Which UNets of a pipeline are on the device: all of them while they fit, else one at a time, swapped where a plan switches."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from engines import Bundle, BundleError, Engine, Manifest, Runner
from engines.bundle.digests import Digest, known_sha256
from engines.bundle.manifest import File
from engines.cuda.streams import wait_for
from engines.errors import EngineMemoryError
from runtime.execution.graph_cache import CudaGraphCache
from runtime.execution.loaded_bundle import LoadedBundle, advice_of, load_runners

__all__ = ["Swapper", "free_bytes"]

_GROWTH = 1.2
"""Bytes on the device for each byte of an engine's files: a choice of our own, for what execution contexts add."""
_SPARE = 2**30
"""Bytes to leave free, also a choice of our own: for features, and for memory that engines do not report."""


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU, with what PyTorch holds but does not use; None on other devices, where UNets are never swapped."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


class _Checked(Bundle):
    """A bundle whose files are hashed anew at a swap only where they were changed since, as by a build in its place."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        super().__init__(folder, manifest)
        self.__dict__["_seen"] = dict[str, tuple[int, ...]]()

    def path(self, file: File, digest: Digest = known_sha256) -> Path:
        """As ``Bundle.path``."""
        seen, state = self.__dict__["_seen"], _state_of(self.folder / file.path)
        if state and seen.get(file.path) == state:
            return super().path(file, lambda _: file.sha256)
        path = super().path(file, digest)
        seen[file.path] = state
        return path


def _state_of(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file is replaced or written to; none where there is no file."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_as_it_was(bundle: Bundle) -> bool:
    try:
        return Bundle.open(bundle.folder).manifest == bundle.manifest
    except BundleError:
        return False


class Swapper:
    """The loaded UNets of a pipeline; text encoder and VAE are the first bundle's, which stay.

    Swapping costs what the engine takes to load from files that the system still has in memory, and the recordings of the UNet
    that goes. A swap waits until no step is running, on any thread.

    Args:
        bundle: the pipeline's own, which is loaded whole.
        engine: what runs it.
        graphs: recordings of the UNets' steps.
        free: tells a device's free memory in bytes, or None where it is no matter.

    Raises:
        BundleError, EngineError: as ``Engine.load``.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        graphs: CudaGraphCache | None = None,
        free: Callable[[torch.device], int | None] = free_bytes,
    ) -> None:
        self._engine, self._graphs, self._free = engine, graphs, free
        name, manifest = bundle.manifest.variant, bundle.manifest
        bundle = _Checked(bundle.folder, manifest)
        self._runners = {name: load_runners(bundle, engine, manifest.segments)}
        self.networks = {name: LoadedBundle(manifest, self._runners[name], advice_of(bundle, engine))}
        """By variant. Those of UNets that are not on the device have no runners of its segments."""
        self._bundles: dict[str, Bundle] = {name: bundle}
        self._here = {name}
        self._condition = threading.Condition()
        self._running = 0
        self._turn = threading.RLock()
        self.swaps = False
        """Whether the UNets take turns on the device."""

    def add(self, bundle: Bundle) -> None:
        """Load another bundle's UNet. If it does not fit on the device beside the others, these are released first.

        Whether it fits is estimated from the size of its files. It is known once the UNet is loaded, as the engine then reports
        the memory that its runners will work in.

        Raises:
            BundleError, EngineError: as ``Engine.load``.
        """
        name = bundle.manifest.variant
        with self._condition:
            self._condition.wait_for(lambda: not self._running)  # a step would come and go with what is free
            if name in self.networks:
                return
            runners: dict[str, Runner] = {}
            self._bundles[name], self._runners[name] = _Checked(bundle.folder, bundle.manifest), runners
            self.networks[name] = LoadedBundle(bundle.manifest, runners, advice_of(bundle, self._engine))
            if not self._has_room(int(self.bytes_of(name) * _GROWTH)):
                self.swaps = True
            if not self._try(name):
                self.swaps = True
                self._release_all()
                self._load(name)

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more fit onto the device, with what runners will work in and some to spare."""
        free = self._free(self._engine.device)
        return free is None or size + self._engine.scratch_bytes() + _SPARE <= free

    def _try(self, unet: str) -> bool:
        """Load a UNet beside those that are here; False where it turns out not to fit. With swaps, as ``_load``."""
        try:
            self._load(unet)
        except (torch.OutOfMemoryError, EngineMemoryError):
            if self.swaps:
                raise
            return False
        return self.swaps or self._has_room(0)

    def bytes_of(self, unet: str) -> int:
        """Bytes that move when a UNet is loaded: the size of its engines' files, or of its weights where these are elsewhere."""
        total = 0
        for segment in self.networks[unet].manifest.unet_segments:
            compiled = segment.engines.get(self._engine.name)
            total += max(sum(file.bytes for file in files) for files in (segment.onnx, compiled.files if compiled else ()))
        return total

    def bundle_of(self, unet: str) -> Bundle:
        """The bundle that a UNet was loaded from."""
        return self._bundles[unet]

    def is_outdated(self) -> bool:
        """Whether another bundle than the pipeline's own, whose UNet was loaded, is there no more as it was."""
        _, *others = self._bundles.values()
        return any(not _is_as_it_was(bundle) for bundle in others)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Where UNets are swapped, one call at a time; others wait for its end, and do not swap them back at every step."""
        with self._turn if self.swaps else nullcontext():
            yield

    @contextmanager
    def pinned(self, unet: str) -> Iterator[float]:
        """A step of a UNet, which stays on the device until the block ends; gives the seconds that it took to get it there."""
        with self._condition:
            seconds = self._load(unet)
            self._running += 1
        try:
            yield seconds
        finally:
            with self._condition:
                self._running -= 1
                self._condition.notify_all()

    def _load(self, unet: str) -> float:
        if self.swaps:
            self._condition.wait_for(lambda: unet in self._here or not self._running)
        if unet in self._here:
            return 0.0
        wait_for(self._engine.device)  # which may still be at work for steps that are over here
        started = time.perf_counter()
        if self.swaps:
            self._release_all()
        bundle = self._bundles[unet]
        self._runners[unet].update(load_runners(bundle, self._engine, bundle.manifest.unet_segments))
        self._here.add(unet)
        wait_for(self._engine.device)
        return time.perf_counter() - started

    def _release_all(self) -> None:
        """Let every UNet go, and the recordings, which hold addresses in their memory."""
        if self._graphs is not None:
            self._graphs.clear()
        for name in self._here:
            for segment in self.networks[name].manifest.unet_segments:
                del self._runners[name][segment.name]
        self._here.clear()
        if self._engine.device.type == "cuda":
            torch.cuda.empty_cache()
