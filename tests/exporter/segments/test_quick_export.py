"""The exporter without its second trace writes what it writes with it, and is left alone where it is needed."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from engines import Segment
from engines.bundle.manifest import Feature
from exporter.segments import quick_export, trace

SEGMENT = Segment(name="block", units=("block",), inputs=("x",), outputs=("y",))
FEATURES = {name: Feature(dtype="float32", shape=("batch", 16, "height", "width")) for name in ("x", "y")}


class Block(nn.Module):
    """A normalised convolution and an attention over its pixels, with changes of dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.attend = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 48)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        (x,) = inputs
        rows, channels, height, width = x.shape
        hidden = self.conv(nn.functional.silu(self.norm(x.to(torch.float64).float())))
        tokens = hidden.reshape(rows, channels, height * width).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(*self.attend(tokens).unsqueeze(1).chunk(3, dim=-1))
        mixed = mixed.reshape(rows, height * width, channels)
        return (x + mixed.transpose(1, 2).reshape(rows, channels, height, width).to(x.device, x.dtype),)


class Projected(nn.Module):
    """Linear layers of what is laid out in order, of what is not, and without bias, round a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        (x,) = inputs
        tokens = x.flatten(2).transpose(1, 2)
        made = self.narrow(nn.functional.gelu(self.wide(tokens)))
        last = self.wide(x.permute(0, 2, 3, 1).contiguous())
        made = made + self.narrow(nn.functional.gelu(last.transpose(1, 2), approximate="tanh")).transpose(1, 2).flatten(1, 2)
        return (made.transpose(1, 2).reshape(x.shape),)


class Mixed(nn.Module):
    """A norm over the last dimension, and operands of unlike dtypes, which the exporter has to make explicit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        (x,) = inputs
        x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return ((x * torch.arange(3, dtype=torch.float64)[1] + x.half()).float(),)


class Unwritten(nn.Module):
    """Has an operator that the exporter cannot write, only what it decomposes into."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        (x,) = inputs
        return (torch.nn.functional.softshrink(x) + torch.special.xlog1py(x, x.abs()),)


class Turned(nn.Module):
    """Norms of what is not laid out in order: of a picture whose channels come last, and of one whose sides are exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.plain, self.layer = nn.GroupNorm(4, 16), nn.GroupNorm(2, 16, affine=False), nn.LayerNorm((16,))

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        (x,) = inputs
        x = self.groups(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        x = self.plain(x.transpose(2, 3)).transpose(2, 3).flatten(2).permute(0, 2, 1)
        return (self.layer(x).permute(0, 2, 1).reshape(inputs[0].shape),)


def written(module: nn.Module, folder: Path) -> tuple[Counter[str], Any]:
    """The operators of a module's ONNX file, and what it makes of a picture."""
    folder.mkdir()
    torch.manual_seed(0)
    program = trace.trace_program(SEGMENT, module.eval(), FEATURES, 1)
    (path, *_) = trace.write_onnx(program, SEGMENT, folder / "block.onnx")
    x = torch.randn(3, 16, 5, 7)
    (made,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(made, module(x)[0].detach().numpy(), atol=2e-5)
    nodes = onnx.load(path, load_external_data=False).graph.node
    assert program.module()(x)[0].shape == x.shape  # the torch engine saves it afterwards
    return Counter(node.op_type for node in nodes), made


def described(module: nn.Module) -> tuple[str, str, list[str]]:
    """A module's program, the sizes that it takes, and the shape, the layout in memory and the dtype of all that is in it."""
    program = trace.trace_program(SEGMENT, module.eval(), FEATURES, 1)
    values = [node.meta.get("val") for node in program.graph.nodes]
    layouts = [(value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value for value in values]
    return str(program.graph), str(program.range_constraints), [str(layout) for layout in layouts]


@pytest.mark.parametrize("module", [Block(), Projected(), Mixed()], ids=["quick", "projected", "mixed"])
def test_the_program_is_the_one_that_is_traced_by_itself(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts decide what a reshape is; the exporter and the torch engine take them as they are."""
    quick = described(module)
    monkeypatch.setattr(trace, "quick_trace", nullcontext)
    assert described(module) == quick


@pytest.mark.parametrize("module", [Block(), Mixed(), Turned(), Unwritten()], ids=["quick", "mixed", "turned", "decomposed"])
def test_the_file_is_the_one_that_the_exporter_writes_by_itself(
    module: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, made = written(module, tmp_path / "quick")
    for name in ("quick_export", "quick_trace"):
        monkeypatch.setattr(trace, name, nullcontext)
    slow, wanted = written(module, tmp_path / "slow")
    assert quick == slow
    np.testing.assert_array_equal(made, wanted)


@pytest.mark.parametrize(("module", "decomposed"), [(Block(), False), (Unwritten(), True)], ids=["quick", "decomposed"])
def test_only_what_needs_it_is_traced_again(
    module: nn.Module, decomposed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[object] = []
    decompose = torch.export.ExportedProgram.run_decompositions

    def spy(program: Any, *given: Any, **others: Any) -> Any:
        traced.append(program)
        return decompose(program, *given, **others)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", spy)
    written(module, tmp_path / "one")
    assert bool(traced) == decomposed


def test_a_pytorch_with_other_internals_exports_as_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("torch.onnx._internal.exporter._decomp.get_onnx_implemented_overloads")
    with quick_export.quick_export():
        pass
    monkeypatch.undo()
    assert written(Block(), tmp_path / "one")[0]["Conv"] == 1
