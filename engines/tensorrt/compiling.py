"""How TensorRT and TensorRT-RTX compile a segment: types as in the ONNX file, a profile of shapes, and where features lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.base import Engine, Profile, Traced
from engines.bundle.manifest import Segment
from engines.errors import EngineError
from engines.tensorrt.error_log import ErrorLog
from engines.tensorrt.kernels import CompiledKernels, read_kernels

__all__ = ["Compiling"]


class Compiling(Engine):
    """The half of both engines that builds; ``trt`` is the module that it drives."""

    trt: Any
    _log: ErrorLog

    def compile(
        self, traced: Traced, stem: Path, profile: Profile, targets: Sequence[str], cache_dir: Path | None = None
    ) -> list[Path]:
        """Write ``<stem>.engine``, for inputs between the profile's smallest and largest shapes.

        Raises:
            EngineError: a target is unknown, or the segment does not parse or build: with the first reason given.
        """
        plan = self._compile(traced, profile, self.check_targets(targets), cache_dir)
        path = Path(f"{stem}.engine")  # not with_suffix: a stem such as down.0 has a dot of its own
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plan)
        return [path]

    def kernels(self, traced: Traced, profile: Profile, targets: Sequence[str]) -> CompiledKernels:
        """The kernels that a segment is compiled to at the profile's optimum, without keeping the engine.

        Raises:
            EngineError: as ``compile``.
        """
        only = Profile(profile.optimum, profile.optimum, profile.optimum)
        with self._log.collect_all() as messages:
            self._compile(traced, only, self.check_targets(targets), None, detailed=True)
        return read_kernels(messages)

    def _compile(
        self, traced: Traced, profile: Profile, chosen: tuple[str, ...], cache_dir: Path | None, *, detailed: bool = False
    ) -> Any:
        """The engine's bytes; ``detailed`` makes the compiler log its kernels."""
        with self._log.collect() as errors:
            builder = self.trt.Builder(self._log.logger)
            network, parser = self._parse(builder, traced)
            config = self._configure(builder, network, traced.segment, profile)
            if detailed:
                config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
            self._set_targets(config, chosen)
            plan = self._build(builder, network, config, cache_dir)
            del parser  # not earlier: the network's weights are the parser's memory until the engine is built
        if plan is None:
            reason = errors[0] if errors else "it gives no reason"
            raise EngineError(
                f"segment {traced.segment.name}: {self.name} {self.version()} cannot build it"
                f"{' for ' + ', '.join(chosen) if chosen else ''}: {reason}{_advice(reason)}"
            )
        return plan

    def _parse(self, builder: Any, traced: Traced) -> tuple[Any, Any]:
        # The flag is what makes 10 keep the types of the ONNX file; 11 always does and ignores it.
        network = builder.create_network(1 << int(self.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self.trt.OnnxParser(network, self._log.logger)
        if not parser.parse_from_file(str(traced.onnx)):
            reason = " ".join(str(parser.get_error(0)).split()) if parser.num_errors else "it gives no reason"
            raise EngineError(f"segment {traced.segment.name}: {self.name} {self.version()} cannot read {traced.onnx}: {reason}")
        return network, parser

    def _configure(self, builder: Any, network: Any, segment: Segment, profile: Profile) -> Any:
        config = builder.create_builder_config()
        # fp32 means fp32: with TF32, which is on by default, products keep 10 bits; who wants speed takes fp16.
        config.clear_flag(self.trt.BuilderFlag.TF32)
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            if name not in profile.optimum:
                raise EngineError(f"segment {segment.name}: the profile has no shapes for input {name}; add them")
            shapes.set_shape(name, profile.minimum[name], profile.optimum[name], profile.maximum[name])
        config.add_optimization_profile(shapes)
        self._set_formats(network)
        return config

    def _set_formats(self, network: Any) -> None:
        """Half-precision features with a multiple of 8 channels lie channels last, as convolutions take them: no transposes."""
        inputs = (network.get_input(index) for index in range(network.num_inputs))
        outputs = (network.get_output(index) for index in range(network.num_outputs))
        for tensor in (*inputs, *outputs):
            if len(tensor.shape) == 4 and tensor.shape[1] % 8 == 0 and tensor.dtype == self.trt.float16:
                tensor.allowed_formats = 1 << int(self.trt.TensorFormat.HWC8)

    def _set_targets(self, config: Any, targets: tuple[str, ...]) -> None:
        """Nothing to set where an engine is for the GPU it is built on."""

    def _build(self, builder: Any, network: Any, config: Any, cache_dir: Path | None) -> Any:
        """The engine's bytes; None where it cannot be built."""
        return builder.build_serialized_network(network, config)


def _advice(reason: str) -> str:
    """Advice on the build errors that users meet, to follow the message; empty for others."""
    if "FP32 GEMM is not supported" in reason:
        return "; Turing (sm75) multiplies no fp32 matrices here: build with --precision fp16, or leave sm75 out"
    return ""
