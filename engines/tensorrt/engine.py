"""TensorRT and TensorRT-RTX: one compiler (``compiling.py``) and one loader for both, for their Python interfaces are alike.

What differs: TensorRT builds on the GPU that the engine will run on; TensorRT-RTX builds anywhere, GPU or none, for
named compute capabilities, and finishes the kernels on the user's card.
"""

import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch

from engines.base import Profile, Runner
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Compiled, Segment
from engines.cuda.gpu import missing_gpu
from engines.cuda.graphs import CudaRecorder, Recorder
from engines.errors import EngineError, NeedsBuildError
from engines.support.caches import cache_paths, card_name
from engines.tensorrt.compiling import Compiling
from engines.tensorrt.diagnostics import refusal
from engines.tensorrt.error_log import ErrorLog
from engines.tensorrt.kernel_cache import RuntimeCache
from engines.tensorrt.runner import EngineRunner
from engines.tensorrt.timing_cache import TimingCache
from engines.tensorrt.workspace import StreamWorkspace

__all__ = ["TensorRT", "TensorRTRTX"]

_FALLBACK = "--engine torch or --engine onnxruntime, which run without"


class _TensorRTBase(Compiling):
    """Base of both engines: loading and the checks of the card.

    Args:
        trt: the module to drive, by default the installed one; tests pass a fake.
        device: where tensors live; anything but CUDA is for tests.

    Raises:
        EngineError: the package is not installed, or too old.
    """

    compiles = True
    has_profile = True
    module: ClassVar[str]
    install: ClassVar[str]
    oldest: ClassVar[tuple[int, int]]
    """Version."""

    def __init__(self, trt: Any = None, device: torch.device | None = None) -> None:
        self.trt = trt or self._import()
        self.device = device or torch.device("cuda")
        self._log = ErrorLog(self.trt)
        # The VAE works in more memory than the UNet, whose block is kept for each stream and as long as recordings refer to it.
        self._unet, self._text_and_vae = StreamWorkspace(self.device), StreamWorkspace(self.device)

    @classmethod
    def _import(cls) -> Any:
        try:
            module = import_module(cls.module)
        except (ImportError, OSError, RuntimeError) as error:  # the bindings are found but their libraries are not
            raise EngineError(
                f"engine {cls.name} cannot be used: {error}; install it with: {cls.install}, or choose {_FALLBACK}"
            ) from error
        found = str(module.__version__)
        if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < cls.oldest:
            oldest = ".".join(map(str, cls.oldest))
            raise EngineError(
                f"engine {cls.name} takes version {oldest} or later, found {found}; install it with: {cls.install}, "
                f"or choose {_FALLBACK}"
            )
        return module

    def version(self) -> str:
        """The version of the TensorRT package."""
        return str(self.trt.__version__)

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """Load the segment's engine onto the GPU.

        Raises:
            EngineError: no GPU or driver, the bundle has no such engine, or it was built for another card or version.
            BundleError: the file is damaged.
        """
        self._require_gpu("to run")
        path, *_ = self.compiled_files(bundle, segment)
        self._check_card(bundle, segment)
        runtime = self.trt.Runtime(self._log.logger)
        data = path.read_bytes()
        with self._log.collect() as errors:
            engine = runtime.deserialize_cuda_engine(data)
        if engine is None:
            reasons = self._invalid(runtime, data) or errors[:1] or ["it gives no reason"]
            made = segment.engines[self.name]
            message = (
                f"segment {segment.name}: {self.name} {self.version()} cannot load {path} here: {', '.join(reasons)}; "
                f"it was built by {_origin(made)}"
            )
            raise refusal(message, reasons, up_to_date=self._is_up_to_date(made))
        return self._runner(bundle, segment, (runtime, engine))

    def _check_card(self, bundle: Bundle, segment: Segment) -> None:
        """Refuse what only TensorRT-RTX can run: an engine of another card."""

    def _is_up_to_date(self, made: Compiled) -> bool:
        """Whether a build here would keep an engine: it is of this version and for this GPU."""
        return made.version == self.version() and self._is_for_here(made)

    @abstractmethod
    def _is_for_here(self, made: Compiled) -> bool:
        """Whether an engine was built for the GPU at hand."""

    def _runner(self, bundle: Bundle, segment: Segment, loaded: tuple[Any, Any]) -> Runner:
        return self._runner_with(self._create_context, bundle, segment, loaded)

    def _runner_with(
        self,
        create_context: Callable[[Any], tuple[Any, Any]],
        bundle: Bundle,
        segment: Segment,
        loaded: tuple[Any, Any],
        learned: Callable[[], None] = lambda: None,
    ) -> Runner:
        """A runner whose contexts are made so; ``learned`` is called where one has compiled kernels."""
        features, workspace = bundle.manifest.features, self._workspace_for(bundle, segment)
        current = self._is_up_to_date(segment.engines[self.name])
        return EngineRunner(segment, features, loaded, create_context, self._log, self.name, workspace, current, learned)

    def _workspace_for(self, bundle: Bundle, segment: Segment) -> StreamWorkspace:
        return self._unet if set(segment.units) <= set(bundle.manifest.unet_units) else self._text_and_vae

    def scratch_bytes(self) -> int:
        """Scratch memory, in bytes, that execution contexts have yet to take, as the engines state it when they are loaded."""
        return self._unet.scratch.missing + self._text_and_vae.scratch.missing

    def check_device(self) -> None:
        """Raise EngineError unless there is a GPU, with its driver."""
        self._require_gpu("to run")

    def recorder(self) -> Recorder | None:
        """CUDA graphs."""
        return CudaRecorder(self.device) if self.device.type == "cuda" else None

    def _require_gpu(self, purpose: str) -> None:
        if self.device.type == "cuda" and (missing := missing_gpu()):
            raise EngineError(
                f"engine {self.name} needs an NVIDIA GPU and driver {purpose}, and a PyTorch built for CUDA ({missing}); "
                f"install them, or choose {_FALLBACK}"
            )

    def _invalid(self, runtime: Any, data: bytes) -> list[str]:
        """Return TensorRT-RTX's reasons why an engine is invalid on this machine, in words; empty where it cannot tell."""
        examine = getattr(runtime, "get_engine_validity", None)
        if examine is None:
            return []
        bits = int(examine(data)[1])
        members = self.trt.EngineInvalidityDiagnostics.__members__
        return [name.replace("_", " ").lower() for name, member in members.items() if int(member) & bits]

    def _cache_stem(self) -> str:
        """Of a cache's file: what it is for."""
        return f"{self.name}-{self.version()}-{card_name(self.device)}"

    def _create_context(self, engine: Any) -> tuple[Any, Any]:
        """A context that is given the memory it works in (those of a stream share it), and what must outlive it."""
        return engine.create_execution_context(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED), None


class TensorRT(_TensorRTBase):
    """TensorRT 10 and 11: engines for the GPU they are built on."""

    name = "tensorrt"
    module = "tensorrt"
    install = "pip install --upgrade tensorrt"
    oldest = (10, 8)

    def check_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The compute capability and the name of the GPU at hand, whatever else is named: it is what is built for.

        Kernels are chosen by their times on the card, so an engine of another model is another one.

        Raises:
            EngineError: other targets were given, or there is no GPU.
        """
        if targets and tuple(targets) != self._here():
            raise EngineError(
                f"engine {self.name} builds for the GPU at hand and takes no targets, got {', '.join(targets)}; "
                "leave --targets out, or choose --engine tensorrt-rtx, which builds for other GPUs"
            )
        self._require_gpu("to build")
        return self._here()

    def _here(self) -> tuple[str, ...]:
        """The targets of engines built here: this GPU's compute capability and name; empty without a GPU."""
        card = _card(self.device)
        return (card, card_name(self.device)) if card else ()

    def _is_for_here(self, made: Compiled) -> bool:
        return bool(made.targets) and made.targets == self._here()

    def _check_card(self, bundle: Bundle, segment: Segment) -> None:
        made, here = segment.engines[self.name], self._here()
        if here and made.targets and not self._is_for_here(made):
            raise NeedsBuildError(
                f"segment {segment.name}: its {self.name} engine was built by {_origin(made)}, this GPU is {', '.join(here)}"
            )

    def _build(self, builder: Any, network: Any, config: Any, cache_dir: Path | None) -> Any:
        if cache_dir is None:
            return super()._build(builder, network, config, cache_dir)
        timings = TimingCache(cache_dir / f"{self._cache_stem()}.timings")
        cache = timings.attach(config)
        plan = super()._build(builder, network, config, cache_dir)
        timings.store(config, cache)
        return plan


class TensorRTRTX(_TensorRTBase):
    """TensorRT for RTX: engines built ahead of time on any machine, one for all the compute capabilities named."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    install = "pip install --upgrade tensorrt-rtx"
    oldest = (1, 3)
    targets_allowed = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
    DEFAULT_TARGETS: ClassVar[tuple[str, ...]] = ("sm80", "sm86", "sm89", "sm120", "sm121")
    """Ampere and later; one engine serves them all. Turing (sm75) must be asked for: it has no fp32 matrix product, and NVIDIA
    advises against engines that serve it and later cards at once."""

    def __init__(self, trt: Any = None, device: torch.device | None = None) -> None:
        super().__init__(trt, device)
        self._caches: dict[Path, RuntimeCache] = {}

    def check_targets(self, targets: Sequence[str]) -> tuple[str, ...]:
        """The targets named, each once; with none, ``DEFAULT_TARGETS``, or the GPU at hand where these leave it out.

        The GPU at hand may always be named: the library builds for it also where it has no name for it.

        Raises:
            EngineError: a target is unknown to this version of TensorRT-RTX.
        """
        here = _card(self.device)
        allowed = self._allowed(here)
        for target in targets:
            if target not in allowed:
                raise EngineError(
                    f"engine {self.name} {self.version()}: unknown target {target!r}; choose from: "
                    f"{', '.join(allowed)} (sm86 is compute capability 8.6: https://developer.nvidia.com/cuda-gpus)"
                )
        if targets:
            return tuple(dict.fromkeys(targets))
        if here and here not in self.DEFAULT_TARGETS:
            return (here,)
        return tuple(target for target in self.DEFAULT_TARGETS if target in allowed)

    def _allowed(self, here: str | None = None) -> list[str]:
        """The targets that this version of TensorRT-RTX knows, and the GPU at hand."""
        known = self.trt.ComputeCapability.__members__
        named = [target for target in self.targets_allowed if target.upper() in known]
        return named if here is None or here in named else [*named, here]

    def _is_for_here(self, made: Compiled) -> bool:
        return _card(self.device) in made.targets

    def _set_targets(self, config: Any, targets: tuple[str, ...]) -> None:
        config.num_compute_capabilities = len(targets)
        known = self.trt.ComputeCapability.__members__
        for index, target in enumerate(targets):
            config.set_compute_capability(known.get(target.upper(), known.get("CURRENT")), index)

    def _configure(self, builder: Any, network: Any, segment: Segment, profile: Profile) -> Any:
        config = super()._configure(builder, network, segment, profile)
        # Without it a large engine may allocate while it runs, which no CUDA graph can hold.
        config.set_flag(self.trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return config

    def _runner(self, bundle: Bundle, segment: Segment, loaded: tuple[Any, Any]) -> Runner:
        cache = self._cache(bundle)

        def create_context(engine: Any) -> tuple[Any, Any]:
            config = self._runtime_config(engine)
            # NVIDIA: a cache that goes before its contexts takes them with it.
            needs = config, cache.attach(config)
            return engine.create_execution_context(config), needs

        return self._runner_with(create_context, bundle, segment, loaded, cache.note)

    def flush(self) -> None:
        """Write the runtime caches that have grown."""
        for cache in list(self._caches.values()):
            cache.store()

    def _runtime_config(self, engine: Any) -> Any:
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Graphs are ours: they hold a whole step, and the library's own would be one more inside them. Kernels that are still
        # to be exchanged for better ones would stay in a graph as they are, so they are compiled before the first launch.
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config

    def _cache(self, bundle: Bundle) -> RuntimeCache:
        if bundle.folder not in self._caches:
            paths = cache_paths(bundle.folder, bundle.manifest.key, f"{self._cache_stem()}.bin")
            self._caches[bundle.folder] = RuntimeCache(paths)
        return self._caches[bundle.folder]


def _card(device: torch.device) -> str | None:
    """The GPU at hand as a target, such as ``sm89``; None without one."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _origin(made: Compiled) -> str:
    """Which version an engine was built by, and for what."""
    return f"{made.version} for {', '.join(made.targets) or 'the GPU it was built on'}"
