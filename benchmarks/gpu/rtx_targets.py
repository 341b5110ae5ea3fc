"""Which of TensorRT-RTX's targets make engines that the card at hand runs: a small network, built, read and run for each.

The library names no target for some cards (an H100 is sm90), and its documentation does not say what runs there.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engines.support.cli import Parser, run_command
from engines.tensorrt.engine import TensorRTRTX

__all__ = ["main"]

CHOICES: dict[str, tuple[str, ...]] = {
    "CURRENT": ("CURRENT",),
    "none set": (),
    "SM80": ("SM80",),
    "SM89": ("SM89",),
    "SM80, SM86, SM89, SM120, SM121": ("SM80", "SM86", "SM89", "SM120", "SM121"),
}


class _Network(nn.Module):
    """A convolution, a norm and an attention: what a UNet has most of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 64, 3, padding=1), nn.GroupNorm(8, 64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(hidden[:, None], hidden[:, None], hidden[:, None])[:, 0]


def _try(trt: Any, logger: Any, onnx: Path, names: Sequence[str], x: Tensor, expected: Tensor) -> dict[str, object]:
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        return {"parsed": False}
    config = builder.create_builder_config()
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
    data = builder.build_serialized_network(network, config)
    if data is None:
        return {"built": False}
    runtime = trt.Runtime(logger)
    found: dict[str, object] = {"built": True, "bytes": len(bytes(data))}
    if hasattr(runtime, "get_engine_validity"):
        found["validity"] = str(runtime.get_engine_validity(bytes(data)))
    engine = runtime.deserialize_cuda_engine(bytes(data))
    if engine is None:
        return found | {"read": False}
    context = engine.create_execution_context()
    if context is None:
        return found | {"read": True, "context": False}
    made, stream = torch.empty_like(expected), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for name, tensor in (("x", x), ("y", made)):
        context.set_tensor_address(name, tensor.data_ptr())
    ran = context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    error = float((made - expected).abs().max() / expected.abs().max())
    return found | {"read": True, "context": True, "ran": bool(ran), "error": error}


def main(arguments: Sequence[str]) -> None:
    """Print a line of JSON for each choice of targets, with what the library logged."""
    Parser(prog="python -m benchmarks.gpu.rtx_targets", description=__doc__).parse_args(arguments)
    engine = TensorRTRTX()
    engine.check_device()
    trt, log = engine.trt, engine._log
    torch.manual_seed(0)
    module, x = _Network().half().cuda(), torch.randn(1, 4, 32, 32).half().cuda()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, onnx = module(x), Path(folder) / "small.onnx"
        arguments_ = (x.cpu(),)
        torch.onnx.export(
            module.cpu(), arguments_, onnx, dynamo=True, opset_version=18, input_names=["x"], output_names=["y"], verbose=False
        )
        for name, targets in CHOICES.items():
            with log.collect() as errors:
                try:
                    found = _try(trt, log.logger, onnx, targets, x, expected)
                except Exception as error:
                    found = {"raised": f"{type(error).__name__}: {error}"}
            print(json.dumps({"targets": name, **found, "errors": errors[:3]}), flush=True)


if __name__ == "__main__":
    run_command(main)
