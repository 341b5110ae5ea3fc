"""Programs of the torch engine are read as data: what a stranger hides in one does not run."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch
from torch import nn

from engines.program import ProgramError
from engines.pt2 import read_program, without_pickles

CPU = torch.device("cpu")
Members = dict[str, bytes]


class Layer(nn.Module):
    """A few operators: a list of tensors, a size, a word, a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)
        self.twin = nn.Linear(4, 8)
        self.twin.weight = self.linear.weight
        self.register_buffer("shift", torch.arange(8.0), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = (self.linear(x) + self.twin(x) + self.shift).chunk(2, dim=-1)
        return nn.functional.gelu(one, approximate="tanh"), other.reshape(x.shape[0] * 2, -1)


@pytest.fixture(scope="module")
def saved() -> tuple[Layer, bytes]:
    torch.manual_seed(0)
    layer, rows = Layer().eval(), torch.export.Dim("rows")
    program = torch.export.export(layer, (torch.randn(3, 4),), dynamic_shapes=({0: rows},))
    archive = io.BytesIO()
    torch.export.save(program, archive)
    return layer, archive.getvalue()


def members_of(data: bytes) -> Members:
    with ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path: Path, members: Members, compression: int = ZIP_STORED) -> Path:
    with ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_program_computes_what_its_module_does(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    layer, data = saved
    program = read_program(written(tmp_path / "a.pt2", members_of(data)), CPU)
    for rows in (1, 5):
        x = torch.randn(rows, 4)
        with torch.no_grad():
            assert all(torch.equal(made, wanted) for made, wanted in zip(program(x), layer(x), strict=True))


def test_what_is_written_has_no_pickle(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    with ZipFile(io.BytesIO(saved[1])) as archive:
        assert [name for name in archive.namelist() if "sample_inputs" in name]
        without_pickles(archive, tmp_path / "a.pt2")
    members = members_of((tmp_path / "a.pt2").read_bytes())
    assert members == {name: data for name, data in members_of(saved[1]).items() if "sample_inputs" not in name}
    read_program(tmp_path / "a.pt2", CPU)


class Trap:
    """Unpickled, it leaves a file."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.witness,)


def edited(members: Members, name: str, change: Callable[[Any], Any]) -> None:
    data = json.loads(members[name])
    change(data)
    members[name] = json.dumps(data).encode()


WEIGHTS, CONSTANTS = "archive/data/weights/model_weights_config.json", "archive/data/constants/model_constants_config.json"
MODEL = "archive/models/model.json"


def pickled_weight(members: Members, trap: bytes) -> None:
    edited(members, WEIGHTS, lambda data: data["config"]["linear.weight"].update(use_pickle=True, path_name="trap"))
    members["archive/data/weights/trap"] = trap


def pickled_constant(prefix: str) -> Callable[[Members, bytes], None]:
    def plant(members: Members, trap: bytes) -> None:
        entry = {"path_name": f"{prefix}_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        edited(members, CONSTANTS, lambda data: data["config"].update(other=entry))
        members[f"archive/data/constants/{prefix}_0"] = trap

    return plant


def target(name: str) -> Callable[[Members, bytes], None]:
    def plant(members: Members, trap: bytes) -> None:
        edited(members, MODEL, lambda data: data["graph_module"]["graph"]["nodes"][-1].update(target=name))

    return plant


def argument(**value: Any) -> Callable[[Members, bytes], None]:
    def plant(members: Members, trap: bytes) -> None:
        node = {
            "target": "torch.ops.aten.from_file.default", "inputs": [{"name": "filename", "kind": 1, "arg": value}],
            "outputs": [{"as_tensor": {"name": "read"}}], "metadata": {},
        }  # fmt: skip
        edited(members, MODEL, lambda data: data["graph_module"]["graph"]["nodes"].insert(0, node))

    return plant


def test_inputs_of_another_number_and_outputs_that_are_none(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    members = members_of(saved[1])
    program = read_program(written(tmp_path / "a.pt2", members), CPU)
    with pytest.raises(ProgramError, match="it takes 1 inputs and is given 2"):
        program(torch.zeros(1, 4), torch.zeros(1, 4))

    def a_size(data: Any) -> None:
        graph = data["graph_module"]["graph"]
        sizes = [node["outputs"][0]["as_sym_int"]["as_name"] for node in graph["nodes"] if "sym_size" in node["target"]]
        data["graph_module"]["signature"]["output_specs"][0]["user_output"]["arg"]["as_tensor"]["name"] = sizes[0]

    edited(members, MODEL, a_size)
    with pytest.raises(ProgramError, match="an output is no tensor"):
        read_program(written(tmp_path / "a.pt2", members), CPU)(torch.zeros(1, 4))


REFUSED = {
    "weight": (pickled_weight, "is pickled, and no pickle is opened"),
    "tensor constant": (pickled_constant("tensor"), "is pickled, and no pickle is opened"),
    "object of TorchScript": (pickled_constant("custom_obj"), "is pickled, and no pickle is opened"),
    "opaque object": (pickled_constant("opaque_obj"), "is pickled, and no pickle is opened"),
    "torch.load": (target("torch.load"), "operator 'torch.load' is not allowed"),
    "a module of torch": (target("torch.os.system"), "operator 'torch.os.system' is not allowed"),
    "an operator that writes": (target("torch.ops.aten.copy_.default"), "is not allowed"),
    "a method of an operator": (target("torch.ops.aten.add.overloads"), "is not allowed"),
    "another library's operator": (target("torch.ops.prim.device.default"), "is not allowed"),
    "code": (target("__import__('os').system('true')"), "is not allowed"),
    "a file's name": (argument(as_string="/etc/passwd"), "as_string = '/etc/passwd' is not allowed as an operator's argument"),
    "a graph": (argument(as_graph={"name": "g", "graph": {}}), "as_graph = .* is not allowed as an operator's argument"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_what_could_run_is_refused(saved: tuple[Layer, bytes], place: str, tmp_path: Path) -> None:
    plant, message = REFUSED[place]
    members, witness = members_of(saved[1]), tmp_path / "witness"
    plant(members, pickle.dumps(Trap(witness)))
    with pytest.raises(ProgramError, match=message):
        read_program(written(tmp_path / "a.pt2", members), CPU)
    assert not witness.exists()


def test_what_torch_would_run_is_not_read(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    """PyTorch's loader would unpickle the first three, and evaluate the last two."""
    members, witness = members_of(saved[1]), tmp_path / "witness"
    trap = pickle.dumps(Trap(witness))
    for name in ("sample_inputs/model.pt", "weights/model.pt", "constants/model.pt"):
        members[f"archive/data/{name}"] = trap
    code = f"__import__('pathlib').Path({str(witness)!r}).touch()"
    edited(members, MODEL, lambda data: data["range_constraints"].update({code: {"min_val": 0, "max_val": 9}}))
    edited(members, MODEL, lambda data: data.update(guards_code=[code]))
    program = read_program(written(tmp_path / "a.pt2", members), CPU)
    x = torch.randn(2, 4)
    with torch.no_grad():
        assert torch.equal(program(x)[0], saved[0](x)[0])
    assert not witness.exists()


def test_a_trap_would_have_run(tmp_path: Path) -> None:
    """So that the tests above mean something."""
    pickle.loads(pickle.dumps(Trap(tmp_path / "witness")))
    assert (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop(MODEL), "model.json"),
        (lambda members: members.update({MODEL: b"[" * 100_000}), "recursion"),
        (lambda members: members.update({WEIGHTS: b'{"config": {}}'}), "linear.weight"),
        (lambda members: edited(members, WEIGHTS, lambda d: d["config"]["linear.weight"]["tensor_meta"].update(dtype=99)), "99"),
        (
            lambda members: edited(
                members, WEIGHTS, lambda d: d["config"]["linear.weight"]["tensor_meta"].update(sizes=[{"as_int": 10**9}] * 2)
            ),
            "storage",
        ),
        (lambda members: edited(members, MODEL, lambda d: d["graph_module"]["graph"]["nodes"].pop(0)), "nothing before it makes"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(
    saved: tuple[Layer, bytes], change: Callable[[Members], Any], message: str, tmp_path: Path
) -> None:
    members = members_of(saved[1])
    change(members)
    with pytest.raises(ProgramError, match=message) as caught:
        read_program(written(tmp_path / "a.pt2", members), CPU)
    assert "\n" not in str(caught.value)


def test_a_compressed_archive_is_refused(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    """It could be small and hold more than there is memory."""
    with pytest.raises(ProgramError, match="compressed"):
        read_program(written(tmp_path / "a.pt2", members_of(saved[1]), ZIP_DEFLATED), CPU)


def test_operators_that_cannot_take_their_input_are_named(saved: tuple[Layer, bytes], tmp_path: Path) -> None:
    program = read_program(written(tmp_path / "a.pt2", members_of(saved[1])), CPU)
    with pytest.raises(ProgramError, match=r"operator torch.ops.aten.linear.default fails: "):
        program(torch.randn(2, 5))
