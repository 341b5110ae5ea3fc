"""One convolution at Stable Diffusion 1.5's shapes, plain and conditional in every form (see `benchmarks.condconv.costs`)."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional

from engines import Segment
from engines.bundle.manifest import Feature, Unit
from exporter.graph.condconv import FORMS, Mixing, exported
from exporter.graph.unit_modules import SegmentModule
from exporter.segments.trace import trace
from tuning.surgery.condconv import CondConv2d, Router

__all__ = ["CHANNELS", "EXPERTS", "layers", "ratios", "session"]

Run = Callable[[], Any]
EXPERTS, CHANNELS, TIME = 4, 320, 1280


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """As the onnxruntime engine makes one, with a number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ratios(runs: Mapping[str, Run], base: str, rounds: int, steps: int = 1) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of each run's processor time over `base`'s in the same round; and the median in milliseconds.

    A turn is `steps` runs in a row, as sampling is where a model is so small that its weights stay in the processor's caches.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.process_time()
            for _ in range(steps):
                run()
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - started) / steps)
    figures = {}
    for name, times in seconds.items():
        shares = [mine / other for mine, other in zip(times, seconds[base], strict=True)]
        figures[name] = {
            "ratio": round(statistics.median(shares), 3),
            "low": round(min(shares), 3),
            "high": round(max(shares), 3),
            "ms": round(1000 * statistics.median(times), 2),
        }
    return figures


class _Plain(nn.Module):
    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.convolution(x)
        return result


class _Outside(nn.Module):
    """The kernel comes from elsewhere: a segment of its own that mixes it once per step."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach())

    def forward(self, x: Tensor, kernel: Tensor) -> Tensor:
        return functional.conv2d(x, kernel[0], self.bias, padding=1)


def layer_modules() -> dict[str, nn.Module]:
    """The same convolution plain and in every form; "outside" is two modules, whose times are added."""
    torch.manual_seed(0)
    plain = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    made: dict[Router, CondConv2d] = {}
    for router in ("timestep", "features"):
        made[router] = CondConv2d(plain, EXPERTS, router, TIME)
        nn.init.normal_(made[router].router.weight, std=0.02)
    modules: dict[str, nn.Module] = {"plain": _Plain(plain), "timestep": exported(made["timestep"])}
    modules |= {"timestep, outside": _Outside(plain.bias), "mixing": Mixing(made["timestep"])}  # type: ignore[arg-type]
    return modules | {f"features, {form}": exported(made["features"], form) for form in FORMS}


def export(module: nn.Module, reads: Sequence[str], batch: int | str, path: Path) -> None:
    """Traces a layer as bundles are traced; `batch` is a number where it is fixed."""
    features = {
        "x": Feature(dtype="float32", shape=(batch, CHANNELS, "height", "width")),
        "time": Feature(dtype="float32", shape=(1, TIME)),
        "kernel": Feature(dtype="float32", shape=(1, CHANNELS, CHANNELS, 3, 3)),
    }
    layer = Unit(name="layer", kind="layer", inputs=tuple(reads))
    segment = Segment(name="layer", units=("layer",), inputs=layer.inputs, outputs=layer.outputs)
    trace(segment, SegmentModule([layer], {"layer": module}, segment.inputs, segment.outputs), features, 1, path)


def rtx_layers(path: Path) -> int | None:
    """How many layers TensorRT-RTX builds an engine from; None if it does not, or is not installed."""
    try:
        import tensorrt_rtx as trt
    except ImportError:
        return None
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        return None
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for number in range(network.num_inputs):
        put = network.get_input(number)
        limits = [[((1, 2, 4) if n == 0 else (8, 32, 64))[k] if d < 0 else d for n, d in enumerate(put.shape)] for k in range(3)]
        profile.set_shape(put.name, *limits)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    return int(network.num_layers) if builder.build_serialized_network(network, config) is not None else None


def layers(rounds: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """One row per form, side and batch: time and MACs over the plain convolution's, and TensorRT-RTX's layers."""
    modules, rows = layer_modules(), []
    given = {
        "x": torch.randn(2, CHANNELS, 6, 5),
        "time": torch.randn(1, TIME),
        "kernel": torch.randn(1, CHANNELS, CHANNELS, 3, 3),
    }
    reads = dict.fromkeys(modules, ("x", "time")) | {"timestep, outside": ("x", "kernel"), "mixing": ("time",)}
    loaded, built = {}, {}
    for name, module in modules.items():
        path = folder / f"{name}.onnx"
        if "grouped" not in name:
            export(module, reads[name], "batch", path)
            loaded[name], built[name] = session(path, threads), rtx_layers(path)
    for side, batch in ((32, 1), (32, 2), (64, 1), (64, 2)):
        given["x"] = torch.randn(batch, CHANNELS, side, side)
        path = folder / f"grouped-{side}-{batch}.onnx"
        export(modules["features, grouped"], ("x", "time"), batch, path)
        loaded["features, grouped"], built["features, grouped"] = session(path, threads), rtx_layers(path)
        figures = ratios({name: _run(one, given) for name, one in loaded.items()}, "plain", rounds)
        mixing = figures.pop("mixing")
        outside = figures["timestep, outside"]
        outside |= {key: round(outside[key] + mixing[key], 3) for key in outside}
        macs = CHANNELS**2 * 9 * side**2 * batch
        for name, row in figures.items():
            times = {"plain": 0, "features, experts": EXPERTS - 1}.get(name, 0)
            mixed = 0 if name in {"plain", "features, experts"} else EXPERTS * CHANNELS**2 * 9
            mixed *= batch if name.startswith("features") else 1
            more = {"macs": round((macs * (1 + times) + mixed) / macs, 3), "rtx_layers": built[name]}
            rows.append({"form": name, "side": side, "batch": batch, **row, **more})
    return rows


def _run(one: onnxruntime.InferenceSession, given: Mapping[str, Tensor]) -> Run:
    feed = {put.name: given[put.name].numpy() for put in one.get_inputs()}
    return lambda: one.run(None, feed)
