"""The ONNX Runtime engine: runs a bundle's ONNX segments, on the CPU or, with its GPU package, on CUDA.

Compiling a segment means to write a copy of its graph in which each attention is one operator of ONNX Runtime's own. A bundle
without copies runs too: its ONNX files are taken as they are, slower and with more memory.
"""

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engines.base import DTYPES, Engine, Profile, Runner, Traced
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Feature, File, Segment
from engines.cuda.graphs import on_stream
from engines.errors import EngineError, EngineMemoryError, NeedsBuildError
from engines.onnx_file import check_names, checked_onnx
from engines.ort.optimized_graphs import OptimizedGraph
from engines.support.caches import cache_paths, card_name, first_writable
from engines.support.records import one_line

__all__ = ["OnnxRuntime"]

_CUDA = "CUDAExecutionProvider"
_TENSORRT = "TensorrtExecutionProvider"
_NO_MEMORY = re.compile(r"allocate memory|bad_alloc|out of memory|std::bad_array_new_length", re.IGNORECASE)
"""In ONNX Runtime's messages, which are all that tells its errors apart."""


class OnnxRuntime(Engine):
    """Runs ONNX segments, with attention fused where the bundle was built for this engine.

    Args:
        threads: CPU threads per operator; by default as many as PyTorch takes, which is one per physical core unless
            ``OMP_NUM_THREADS`` or ``torch.set_num_threads`` says otherwise.
        device: ``cpu`` or ``cuda``; by default CUDA where ONNX Runtime has it and PyTorch finds a GPU.
        tensorrt: on CUDA, leave to TensorRT what it can run. Its engines are built when they are first used with some shapes, and
            kept with the bundle's caches.
        prefer_nhwc: on CUDA, lay features of convolutions channels last (the CUDA provider's option of that name), which tensor
            cores take without transposing. Off by default: whether it is faster is the card's and the segment's to say.

    Raises:
        EngineError: onnxruntime is not installed, or ``device`` is CUDA or ``tensorrt`` is asked for and it cannot be had, or
            ``prefer_nhwc`` without CUDA.
    """

    name = "onnxruntime"
    compiles = True
    has_bfloat16 = False  # it has no convolutions of them

    def __init__(
        self,
        threads: int | None = None,
        device: torch.device | str | None = None,
        tensorrt: bool = False,
        prefer_nhwc: bool = False,
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EngineError(
                f"engine onnxruntime cannot be used: {error}; install it with: pip install onnxruntime "
                "(with an NVIDIA GPU: onnxruntime-gpu)"
            ) from error
        if threads is not None and threads < 1:
            raise EngineError(f"engine onnxruntime: got {threads} threads, expected 1 or more, or None for one per core")
        self._ort: Any = onnxruntime
        self.threads = threads or torch.get_num_threads()
        offered = onnxruntime.get_available_providers()
        cuda = _CUDA in offered and torch.cuda.is_available()
        self.device = torch.device(device or ("cuda" if cuda else "cpu"))
        if self.device.type == "cuda" and not cuda:
            raise EngineError(
                "engine onnxruntime cannot run on cuda here: that needs the package onnxruntime-gpu, a PyTorch built "
                "for CUDA and an NVIDIA GPU; install them, or leave the device out to run on the CPU"
            )
        if tensorrt and (self.device.type != "cuda" or _TENSORRT not in offered):
            raise EngineError(
                "engine onnxruntime cannot leave anything to TensorRT here: that needs CUDA and a package onnxruntime-gpu with "
                f"{_TENSORRT} (it has: {', '.join(offered)}); leave tensorrt out, or choose engine tensorrt"
            )
        if prefer_nhwc and self.device.type != "cuda":
            raise EngineError(
                "engine onnxruntime has prefer_nhwc on CUDA only, and runs on the CPU here; leave it out, or run it where there "
                "are onnxruntime-gpu and an NVIDIA GPU"
            )
        if self.device.type == "cpu":
            _share_arena()
        self._tensorrt, self._prefer_nhwc = tensorrt, prefer_nhwc
        # Sessions must be told their stream when they are made, and take no default stream. One run at a time is put on it: what
        # two threads put there in turns would be work of two runs in one another's memory.
        self._running = threading.Lock()
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(self._ort.__version__)

    def compile(
        self, traced: Traced, stem: Path, profile: Profile, targets: Sequence[str], cache_dir: Path | None = None
    ) -> list[Path]:
        """Write ``<segment>.ort.onnx`` beside the traced file, whose weights it shares; nothing if there is no attention to fuse.

        The ``stem`` is not used: ONNX Runtime reads weights only from the folder of the file that refers to them.

        Raises:
            EngineError: targets were given; the copy runs wherever ONNX Runtime does.
        """
        from engines.ort.fuse_attention import fuse_attention  # what it takes is needed for builds only

        self.check_targets(targets)
        copy = traced.onnx.with_suffix(".ort.onnx")
        return [copy] if fuse_attention(traced.onnx, copy) else []

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """A session on the segment's copy for this engine, or else on its ONNX file, after checking the hashes of all its files.

        Raises:
            EngineError: the segment has no ONNX file, computes in bfloat16, or ONNX Runtime refuses it.
            BundleError: a file is missing or damaged.
        """
        if bundle.manifest.precision_of(segment) == "bf16":
            have = (
                ", ".join(name for name in segment.engines if name != self.name) or "none; build it with another --vae-precision"
            )
            raise EngineError(
                f"segment {segment.name} of bundle {bundle.folder} computes in bfloat16, which engine {self.name} does not; "
                f"choose an engine that the bundle has: {have}"
            )
        files = segment.onnx
        if not files:
            raise NeedsBuildError(f"bundle {bundle.folder} has no ONNX file for segment {segment.name}")
        compiled = segment.engines.get(self.name)
        if compiled is not None and not self._tensorrt:  # TensorRT does not know the fused operator
            files = (*compiled.files, *files)
        path, providers = checked_onnx(bundle, files), self._providers(bundle, segment)
        kept = self._kept_session(path, files) if self.device.type == "cpu" else None
        session = kept or self._session(path, segment, providers)
        check_names(segment, path, _input_names(session), [entry.name for entry in session.get_outputs()])
        if self.device.type == "cpu":
            return _ArrayRunner(segment, bundle.manifest.features, session)
        features, options = bundle.manifest.features, self._run_options()
        return _BoundRunner(segment, features, session, self.device, options, self._stream, self._running)

    def _kept_session(self, path: Path, files: Sequence[File]) -> Any | None:
        """A session on a graph that was optimised at an earlier start, or whose optimised form is kept for later ones."""
        size = sum(file.bytes for file in files)
        if not OptimizedGraph.pays(size):
            return None
        kept = OptimizedGraph(self._ort, path, [file.sha256 for file in files])
        return kept.session(self._options()) or kept.made(self._options(), size)

    def _session(self, path: Path, segment: Segment, providers: Sequence[Any]) -> Any:
        cuda = self.device.type == "cuda"
        try:
            session = self._ort.InferenceSession(str(path), self._options(), providers=providers)
        except Exception as error:  # its exceptions have no base class of their own
            raise NeedsBuildError(
                f"segment {segment.name}: ONNX Runtime {self.version()} refuses {path}, which a newer one may take: "
                f"{one_line(error)}"
            ) from error
        if cuda and _CUDA not in session.get_providers():
            # A missing CUDA library is only a warning to ONNX Runtime; it would run on the CPU with device addresses.
            raise EngineError(
                "engine onnxruntime could not start on the GPU: the CUDA and cuDNN libraries here do not fit "
                f"onnxruntime-gpu {self.version()}; install those that its log names, or choose another engine"
            )
        return session

    def _providers(self, bundle: Bundle, segment: Segment) -> list[Any]:
        """The execution providers for a segment, in order of preference, with their options."""
        if self._stream is None:
            return ["CPUExecutionProvider"]
        gpu = {"device_id": str(self.device.index or 0), "user_compute_stream": str(self._stream.cuda_stream)}
        # fp32 means fp32. The TensorRT provider has no such option (https://github.com/microsoft/onnxruntime/issues/26029).
        tf32 = {"use_tf32": "0"} if bundle.manifest.precision_of(segment) == "fp32" else {}
        layout = {"prefer_nhwc": "1"} if self._prefer_nhwc else {}
        providers: list[Any] = [(_CUDA, gpu | tf32 | layout), "CPUExecutionProvider"]
        return [(_TENSORRT, gpu | self._kept(bundle, segment)), *providers] if self._tensorrt else providers

    def _kept(self, bundle: Bundle, segment: Segment) -> dict[str, str]:
        """Where the TensorRT provider keeps its engines, and what it measured to build them.

        It tells engines apart by the graph, not by the weights: each segment of each bundle has a folder of its own.
        """
        name = f"onnxruntime-{self.version()}-{card_name(self.device)}/{segment.name}"
        folder = first_writable(cache_paths(bundle.folder, bundle.manifest.key, name))
        if folder is None:
            return {}
        return {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder.parent),
        }

    def _run_options(self) -> Any:
        options = self._ort.RunOptions()
        # A run would wait for the GPU before it returns.
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        # A bundle is a chain of sessions, each with its own threads: those of the idle ones must sleep, not spin. This choice
        # and that of memory are measured: docs/onnxruntime.md.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.device.type == "cpu":
            # Memory is asked of the arena tensor by tensor: in one piece for a whole run, it fits less well into what is free.
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.enable_mem_pattern = False
        else:
            options.enable_cpu_mem_arena = False
        options.log_severity_level = 4  # what fails is raised, and said once
        return options


@contextmanager
def _explaining(segment: Segment) -> Iterator[None]:
    """Say which segment it is that fails, and whether for want of memory."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # its exceptions have no base class of their own
        kind = EngineMemoryError if _NO_MEMORY.search(str(error)) else NeedsBuildError
        raise kind(f"segment {segment.name}: ONNX Runtime fails: {one_line(error)}") from error


@cache
def _share_arena() -> None:
    """Give this process's sessions on the CPU one arena, from which threads may take memory at the same time.

    Without one every large tensor is mapped by the system anew, page by page, at each run; with one for each session, each keeps
    its own peak.
    """
    import onnxruntime

    memory = onnxruntime.OrtMemoryInfo("Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(memory, None)  # it grows by doubling: by what is asked for, it would grow to more


class _ArrayRunner(Runner):
    """On the CPU: NumPy views of the tensors in, tensors over ONNX Runtime's arrays out; no copies."""

    def __init__(self, segment: Segment, features: Mapping[str, Feature], session: Any) -> None:
        super().__init__(segment, features)
        self._session = session
        self._taken = _input_names(session)

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        feeds = {name: inputs[name].detach().contiguous().numpy() for name in self._taken}
        with _explaining(self.segment):
            arrays = self._session.run(list(self.segment.outputs), feeds)
            outputs = {name: torch.from_numpy(array) for name, array in zip(self.segment.outputs, arrays, strict=True)}
        return self._checked(outputs, sizes)


class _BoundRunner(Runner):
    """On a GPU: ONNX Runtime reads and writes the tensors' own memory through IO binding; the host copies and waits for nothing.

    All sessions of an engine work on one stream, one run at a time; the stream takes its turn with the current one.
    """

    def __init__(
        self,
        segment: Segment,
        features: Mapping[str, Feature],
        session: Any,
        device: torch.device,
        options: Any,
        stream: torch.cuda.Stream | None,
        running: threading.Lock,
    ) -> None:
        super().__init__(segment, features)
        self._session, self._options, self._stream, self._running = session, options, stream, running
        self._taken = _input_names(session)
        self.device = device

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        # Memory is taken on the call's own stream. That of the shared one goes, once it is free, to the next run there, which may
        # be another call's and would write before this one has read. The contiguous copies live until the run has started.
        taken = {name: inputs[name].detach().contiguous() for name in self._taken}
        outputs = {
            name: torch.empty(shape, dtype=DTYPES[self.features[name].dtype], device=self.device)
            for name, shape in self.output_shapes(sizes).items()
        }
        binding = self._session.io_binding()
        for name, tensor in taken.items():
            binding.bind_input(name, *self._address(tensor))
        for name, tensor in outputs.items():
            binding.bind_output(name, *self._address(tensor))
        with self._turn(), self._running, _explaining(self.segment):
            self._session.run_with_iobinding(binding, self._options)
        return outputs

    def _turn(self) -> AbstractContextManager[None]:
        return nullcontext() if self._stream is None else on_stream(self._stream)

    def _address(self, tensor: torch.Tensor) -> tuple[str, int, Any, list[int], int]:
        """Device, element type, shape and address of a tensor, in the order in which the bindings take them."""
        element = torch.empty(0, dtype=tensor.dtype).numpy().dtype
        return self.device.type, self.device.index or 0, element, list(tensor.shape), tensor.data_ptr()


def _input_names(session: Any) -> tuple[str, ...]:
    """The inputs that the session takes: an optimised file may have lost one that nothing in it reads."""
    return tuple(entry.name for entry in session.get_inputs())
