"""A bundle of two tiny segments, with the symbolic shapes, dtypes and dotted names that a UNet's features have."""

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from engines import Bundle, Engine, Manifest, Profile, Segment, Traced, Unit, make_engine
from engines.bundle.folder import MANIFEST_NAME, describe_file
from engines.bundle.manifest import Compiled, Feature
from engines.tensorrt.engine import TensorRT, TensorRTRTX
from exporter.segments.quick_export import quick_export, quick_trace
from tests.support.device_memory import use_device_memory
from tests.support.fake_tensorrt import DataType, FakeTensorRT, Program

FEATURES = {
    "sample": Feature(dtype="float32", shape=("batch", 4, "height", "width")),
    "timestep": Feature(dtype="int64", shape=("batch",)),
    "text": Feature(dtype="float32", shape=("batch", "tokens=5", 6)),
    "down.0.resnet": Feature(dtype="float32", shape=("batch", 8, "height", "width")),
    "down.0.sampler": Feature(dtype="float32", shape=("batch", 8, "height/2", "width/2")),
    "noise": Feature(dtype="float32", shape=("batch", 4, "height", "width")),
}


class Front(nn.Module):
    """Latents and timestep in; a skip feature and its downsampled form out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.cos(timestep.to(sample.dtype) * 0.01)[:, None, None, None]
        hidden = nn.functional.silu(self.norm(self.conv(sample))) * scale
        return hidden, self.down(hidden)


class Back(nn.Module):
    """The front's features and text states in; cross attention at half size, then the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(6, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, skip: torch.Tensor, down: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        keys = self.keys(text)
        tokens = down.flatten(2).transpose(1, 2)
        weights = (tokens @ keys.transpose(1, 2)).softmax(-1)
        mixed = (weights @ keys).transpose(1, 2).unflatten(2, down.shape[2:])
        return self.out(torch.cat([skip, self.up(down + mixed)], dim=1))


@dataclass(frozen=True)
class Tiny:
    """The bundle, and what it was made from."""

    bundle: Bundle
    modules: dict[str, nn.Module]
    traced: dict[str, Traced]
    profiles: dict[str, Profile]

    def segment(self, name: str) -> Segment:
        return self.bundle.manifest.segment(name)

    def reference(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every feature, by the live modules; shares nothing with the engines."""
        with torch.no_grad():
            skip, down = self.modules["front"](inputs["sample"], inputs["timestep"])
            noise = self.modules["back"](skip, down, inputs["text"])
        return {**inputs, "down.0.resnet": skip, "down.0.sampler": down, "noise": noise}


def random_inputs(batch: int, height: int, width: int, seed: int = 0, tokens: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "text": torch.randn(batch, tokens, 6, generator=generator),
    }


SEGMENTS = (
    Segment(
        name="front",
        units=("down.0.resnet", "down.0.sampler"),
        inputs=("sample", "timestep"),
        outputs=("down.0.resnet", "down.0.sampler"),
    ),
    Segment(name="back", units=("noise",), inputs=("down.0.resnet", "down.0.sampler", "text"), outputs=("noise",)),
)


def trace(segment: Segment, module: nn.Module, example: dict[str, torch.Tensor], path: Path) -> Traced:
    arguments = tuple(example[name] for name in segment.inputs)
    shapes = tuple(
        {axis: Dim.DYNAMIC for axis, dim in enumerate(FEATURES[name].shape) if isinstance(dim, str)} for name in segment.inputs
    )
    with warnings.catch_warnings(), quick_trace(), quick_export():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            arguments,
            path,
            dynamo=True,
            opset_version=18,
            external_data=True,
            dynamic_shapes=shapes,
            input_names=list(segment.inputs),
            output_names=list(segment.outputs),
            verbose=False,
        )
    assert program is not None
    assert program.exported_program is not None
    return Traced(segment, path, program.exported_program)


def profile(segment: Segment) -> Profile:
    """Batches of 1 to 4, latents of 8x8 to 32x32."""

    def shapes(batch: int, side: int) -> dict[str, tuple[int, ...]]:
        sizes: dict[Any, int] = {"batch": batch, "height": side, "width": side, "height/2": side // 2}
        sizes |= {"width/2": side // 2, "tokens=5": 5}
        return {
            name: tuple(dim if isinstance(dim, int) else sizes[dim] for dim in FEATURES[name].shape) for name in segment.inputs
        }

    return Profile(shapes(1, 8), shapes(2, 16), shapes(4, 32))


def write_bundle(folder: Path, segments: tuple[Segment, ...], kinds: dict[str, str] | None = None) -> Bundle:
    """A bundle of the segments; ``kinds`` are of units that are none of the UNet's."""
    names = tuple(dict.fromkeys(name for segment in segments for name in segment.units))
    manifest = Manifest(
        key="0" * 64,
        variant="original",
        source="mini",
        source_sha256="0" * 64,
        precision="fp32",
        sizes=((64, 64),),
        max_images=2,
        latent_channels=4,
        vae_scale=8,
        size_multiple=16,
        text_length=5,
        vocabulary=100,
        features=FEATURES,
        units=tuple(Unit(name=name, kind=(kinds or {}).get(name, "resnet"), inputs=()) for name in names),
        segments=segments,
        files=(),
        made_with={"torch": torch.__version__},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), "utf-8")
    return Bundle.open(folder)


def compile_segment(engine: Engine, traced: Traced, folder: Path, targets: tuple[str, ...] = ()) -> Compiled:
    chosen = engine.check_targets(targets)
    stem = folder / engine.name / traced.segment.name
    files = engine.compile(traced, stem, profile(traced.segment), chosen)
    return Compiled(files=tuple(describe_file(folder, path) for path in files), version=engine.version(), targets=chosen)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """These segments are too small to share, and threads that wait for each other are slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A bundle with ONNX segments and torch programs. Not to be changed: ``damageable`` is a copy for that."""
    folder = tmp_path_factory.mktemp("bundle")
    torch.manual_seed(0)
    modules: dict[str, nn.Module] = {"front": Front(), "back": Back()}
    with torch.no_grad():
        inputs = random_inputs(2, 16, 24)
        skip, down = modules["front"](inputs["sample"], inputs["timestep"])
    example = {**inputs, "down.0.resnet": skip, "down.0.sampler": down}
    engine = make_engine("torch")
    traced, finished = {}, []
    for segment in SEGMENTS:
        traced[segment.name] = trace(segment, modules[segment.name], example, folder / f"{segment.name}.onnx")
        onnx = sorted(folder.glob(f"{segment.name}.onnx*"))
        assert len(onnx) == 2, "the test needs weights in a file of their own"
        update = {
            "onnx": tuple(describe_file(folder, path) for path in onnx),
            "engines": {"torch": compile_segment(engine, traced[segment.name], folder)},
        }
        finished.append(segment.model_copy(update=update))
    bundle = write_bundle(folder, tuple(finished))
    return Tiny(bundle, modules, traced, {segment.name: profile(segment) for segment in SEGMENTS})


@pytest.fixture
def damageable(tiny: Tiny, tmp_path: Path) -> Bundle:
    """A copy of the bundle that a test may break."""
    folder = tmp_path / "copy"
    shutil.copytree(tiny.bundle.folder, folder)
    return Bundle.open(folder)


@pytest.fixture
def device_memory(monkeypatch):
    """Memory that lies as a GPU's does, and that the fake TensorRT takes."""
    use_device_memory(monkeypatch)


@pytest.fixture(params=[TensorRT, TensorRTRTX])
def kind(request):
    """Both of the family."""
    return request.param


@pytest.fixture
def fake(tiny):
    """TensorRT's module, with programs in the place of engines."""
    programs = {}
    for name, module in tiny.modules.items():
        shapes = tiny.profiles[name]
        segment = tiny.segment(name)
        programs[name.encode()] = Program(
            function=module,
            limits={key: (shapes.minimum[key], shapes.maximum[key]) for key in segment.inputs},
            outputs=segment.outputs,
            types={"timestep": DataType.INT64},
        )
    return FakeTensorRT(programs)


@pytest.fixture
def bundle(kind, tiny, tmp_path):
    """A bundle whose engine files hold the names of the fake's programs."""
    segments = []
    for segment in tiny.bundle.manifest.segments:
        path = tmp_path / f"{segment.name}.engine"
        path.write_bytes(segment.name.encode())
        compiled = Compiled(files=(describe_file(tmp_path, path),), version="10.9", targets=("sm86",))
        segments.append(segment.model_copy(update={"engines": {kind.name: compiled}}))
    return write_bundle(tmp_path, tuple(segments))


@pytest.fixture
def card(monkeypatch):
    """Puts a GPU of this name and compute capability into the machine, as far as it is asked what it is."""

    def put(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return put


@pytest.fixture
def load(kind, fake, bundle, device_memory):
    """Loads a segment by name in an engine of the kind, driven by the fake."""
    engine = kind(fake, torch.device("cpu"))
    return lambda name: engine.load(bundle, bundle.manifest.segment(name))
