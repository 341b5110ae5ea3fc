"""What a build does around tracing: nothing twice, nothing half, nothing lost."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engines import Bundle, Manifest, Profile, Segment, Traced, make_engine
from engines.ort.engine import OnnxRuntime
from engines.tensorrt.engine import TensorRT
from exporter import BuildError, BuildOptions, build
from exporter.errors import SourceError
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import load_graph
from exporter.graph.segmentation import segments_of
from exporter.segments.progress import Step
from runtime import Plan, PlanError, Rule, Schedule
from runtime.plans.checks import check_runs
from runtime.plans.key_steps import Uniform
from tests.exporter.conftest import names_in
from tests.support.commands import contents
from tests.support.fake_tensorrt import FakeTensorRT
from tests.support.sources import save_source
from tests.support.unets import make_manifest, small_unet

FakeTrace = Callable[..., list[str]]
UNET_SEGMENTS = [
    "stem",
    "down.0.layer.0",
    "down.0.sampler",
    "down.1",
    "mid",
    "up.0",
    "up.1.layer.0",
    "up.1.layer.1",
    "head",
]


@pytest.fixture
def options(tiny_source: Path, tmp_path: Path) -> BuildOptions:
    return BuildOptions(source=str(tiny_source), out=tmp_path / "out" / "bundle")


def changed(options: BuildOptions, **changes: object) -> BuildOptions:
    return replace(options, **changes)  # type: ignore[arg-type]


def folder_of(options: BuildOptions) -> Path:
    assert options.out is not None
    return options.out


def test_a_build_names_every_file_it_wrote(options: BuildOptions, fake_trace: FakeTrace) -> None:
    traced = fake_trace()
    steps: list[Step] = []
    bundle, built = build(options, steps.append)
    assert built
    assert traced == ["text_encoder", *UNET_SEGMENTS, "vae_decoder", "vae_encoder"]
    manifest = bundle.manifest
    assert {*(file.path for file in manifest.all_files), "manifest.json"} == set(contents(bundle.folder))
    bundle.check()
    assert names_in(bundle.folder.parent) == ["bundle"]
    assert [str(step) for step in steps[:2]] == ["reading the source", "text_encoder: tracing"]
    assert sorted({step.done for step in steps}) == list(range(13))
    assert {step.total for step in steps[1:]} == {12}
    assert (1, 12, "stem", "tracing") in [step[:4] for step in steps]
    assert steps[-1] == Step(12, 12, "", "done", 0.0)


def test_only_what_is_known_is_copied_from_a_checkpoint(tiny_source: Path, tmp_path: Path, fake_trace: FakeTrace) -> None:
    """A stranger's folder may hold links to this machine's files, which would leave it with the bundle."""
    fake_trace()
    secret, source = tmp_path / "secret", shutil.copytree(tiny_source, tmp_path / "source")
    secret.write_text("secret")
    for name in ("LICENSE", "notes.json", "model.bin"):
        (source / "tokenizer" / name).symlink_to(secret)
    (source / "scheduler" / "LICENSE").write_text("free")
    bundle, _ = build(BuildOptions(source=str(source), out=tmp_path / "bundle"))
    copied = {path.relative_to(bundle.folder).as_posix() for path in bundle.folder.glob("[ts]*er/*")}
    own = {f"tokenizer/{name}" for name in names_in(tiny_source / "tokenizer")}
    assert copied == own | {"scheduler/scheduler_config.json", "scheduler/LICENSE"}
    assert not [path for path in bundle.folder.rglob("*") if path.is_file() and path.read_bytes() == b"secret"]


def test_the_manifest_describes_the_checkpoint(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    manifest = build(changed(options, precision="fp16", sizes=((32, 48), (16, 16)), max_images=2))[0].manifest
    assert (manifest.latent_channels, manifest.vae_scale, manifest.size_multiple) == (4, 2, 4)
    assert (manifest.text_length, manifest.vocabulary) == (32, 636)
    assert (manifest.sizes, manifest.max_images, manifest.precision) == (((32, 48), (16, 16)), 2, "fp16")
    features = manifest.features
    # The graph's ends stay float32, so that the scheduler's arithmetic is exact; what is between segments is half as wide.
    for name in ("sample", "timestep", "head", "latents", "vae_decoder", "image", "vae_encoder"):
        assert features[name].dtype == "float32"
    for name in ("text_encoder", "time", "stem", "down.0.sampler", "up.0.sampler"):
        assert features[name].dtype == "float16"
    assert features["tokens"].dtype == "int64"
    assert features["vae_decoder"].shape == features["image"].shape == ("images", 3, "2*height", "2*width")
    assert features["vae_encoder"].shape == ("images", 8, "height", "width")
    assert {"torch", "diffusers", "onnx", "unet-heirloom"} <= set(manifest.made_with)
    # A sum has no weights of its own, but for the shortcut of a ResNet.
    weightless = {"time", "resnet", "attention"}
    assert all(unit.parameters > 0 for unit in manifest.units if unit.kind not in weightless)


def test_the_same_build_again_does_nothing(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    build(options)
    before = contents(folder_of(options))
    traced = fake_trace()
    bundle, built = build(options)
    assert not built
    assert not traced
    assert contents(bundle.folder) == before


def test_the_embedded_model_is_up_to_date(mini_bundle: Bundle) -> None:
    before = contents(mini_bundle.folder)
    bundle, built = build(BuildOptions(source="mini", out=mini_bundle.folder))
    assert not built
    assert bundle.manifest == mini_bundle.manifest
    assert contents(mini_bundle.folder) == before


def test_two_builds_of_the_same_things_have_the_same_key(options: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    fake_trace()
    first, second = build(options)[0], build(changed(options, out=tmp_path / "second", force=True))[0]
    assert first.manifest.key == second.manifest.key
    assert first.manifest.units == second.manifest.units
    assert {name: size for name, (size, _) in contents(first.folder).items() if name != "manifest.json"} == {
        name: size for name, (size, _) in contents(second.folder).items() if name != "manifest.json"
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"granularity": "layer"},
        {"plans": ("block:3",)},
        {"sizes": ((32, 32),)},
        {"max_images": 1},
        {"engines": ("onnxruntime", "null")},
    ],
)
def test_other_options_make_another_key(options: BuildOptions, fake_trace: FakeTrace, changes: dict[str, object]) -> None:
    fake_trace()
    first = build(options)[0].manifest.key
    assert build(changed(options, force=True, **changes))[0].manifest.key != first


def test_a_changed_plan_file_makes_another_key(options: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    fake_trace()
    path = tmp_path / "plan.json"
    path.write_text(plan_inheriting("up.0.layer.0.resnet").model_dump_json())
    build(changed(options, plans=(str(path),)))
    assert not build(changed(options, plans=(str(path),)))[1]
    path.write_text(plan_inheriting("up.1.layer.0.resnet").model_dump_json())
    with pytest.raises(BuildError, match="exists and is kept"):
        build(changed(options, plans=(str(path),)))


def plan_inheriting(unit: str) -> Plan:
    return Plan(name="inner", rules=(Rule(units=(unit,), when=Uniform(every=2)),))


def check(plan: Plan, manifest: Manifest) -> None:
    check_runs(Schedule(plan, {"original": manifest}, [900.0, 600.0, 300.0, 0.0]))


def test_other_weights_make_another_key(options: BuildOptions, fake_trace: FakeTrace, tiny_source: Path, tmp_path: Path) -> None:
    fake_trace()
    copy = tmp_path / tiny_source.name
    shutil.copytree(tiny_source, copy)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    same, other = (
        build(changed(options, source=str(tiny_source)))[0],
        build(changed(options, source=str(copy), out=tmp_path / "b"))[0],
    )
    assert same.manifest.source_sha256 != other.manifest.source_sha256
    assert same.manifest.key != other.manifest.key


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_images": 10**9}, "max_images is 1000000000, expected 1 to 1024"),
        ({"sizes": ((8192, 8192),)}, "8192x8192, expected multiples of 4 and at most 16777216 pixels"),
    ],
)
def test_what_could_not_be_opened_is_not_built(
    options: BuildOptions, fake_trace: FakeTrace, changes: dict[str, object], says: str
) -> None:
    traced = fake_trace()
    with pytest.raises(BuildError, match=f"no bundle can be built so: .*{says}"):
        build(changed(options, **changes))
    assert traced == []
    assert not folder_of(options).exists()


def test_a_model_whose_own_size_is_none_that_bundles_take(tmp_path: Path, fake_trace: FakeTrace) -> None:
    fake_trace()
    options = BuildOptions(
        source=str(save_source(tmp_path / "odd", small_unet("two stages", sample_size=9))), out=tmp_path / "out"
    )
    with pytest.raises(BuildError, match="the model's own size is 18x18: .* multiples of 4 .*; name one with --sizes"):
        build(options)
    assert build(changed(options, sizes=((16, 20),)))[1]


def test_a_recipe_that_is_not_there(options: BuildOptions) -> None:
    for name in ("gone.json", f"{'x' * 5000}.json"):
        with pytest.raises(SourceError, match=r" is no recipe \("):
            build(changed(options, recipe=Path(name), variant="mine"))


def test_an_existing_bundle_of_other_things_is_kept(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    build(options)
    before = contents(folder_of(options))
    with pytest.raises(
        BuildError, match=r"exists and is kept \(a bundle made from other weights, options or versions\); replace it with --force"
    ):
        build(changed(options, precision="fp16"))
    assert contents(folder_of(options)) == before
    bundle, built = build(changed(options, precision="fp16", force=True))
    assert built
    assert bundle.manifest.precision == "fp16"
    assert names_in(bundle.folder.parent) == ["bundle"]


def test_force_does_not_build_what_is_up_to_date(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    build(options)
    before = contents(folder_of(options))
    assert not build(changed(options, force=True))[1]
    assert contents(folder_of(options)) == before


def test_a_damaged_bundle_is_kept_until_forced(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    build(options)
    (folder_of(options) / "segments" / "stem.onnx").write_bytes(b"other")
    with pytest.raises(BuildError, match=r"is kept .*stem\.onnx is not the file that was built.*--force"):
        build(options)
    assert (folder_of(options) / "segments" / "stem.onnx").read_bytes() == b"other"
    build(changed(options, force=True))[0].check()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_the_users_own_is_never_replaced(options: BuildOptions, fake_trace: FakeTrace, force: bool) -> None:
    fake_trace()
    folder = folder_of(options)
    folder.mkdir(parents=True)
    (folder / "holiday.jpg").write_bytes(b"precious")
    with pytest.raises(BuildError, match="choose another --out"):
        build(changed(options, force=force))
    assert (folder / "holiday.jpg").read_bytes() == b"precious"
    assert names_in(folder.parent) == ["bundle"]


def test_a_file_in_the_bundles_place_is_never_replaced(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    folder = folder_of(options)
    folder.parent.mkdir(parents=True)
    folder.write_text("notes")
    for force in (False, True):
        with pytest.raises(BuildError, match="choose another --out"):
            build(changed(options, force=force))
    assert folder.read_text() == "notes"


def test_an_empty_folder_is_filled(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace()
    folder_of(options).mkdir(parents=True)
    assert build(options)[1]


@pytest.fixture
def tensorrt(fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeTensorRT]:
    """Puts an NVIDIA card of compute capability 8.9 and that name into the machine, and a TensorRT that builds for it."""

    def put(name: str) -> FakeTensorRT:
        fake_trace()
        module = FakeTensorRT({})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        monkeypatch.setattr(TensorRT, "_import", lambda *given: module)
        return module

    return put


def test_engines_of_another_card_are_built_anew(options: BuildOptions, tensorrt: Callable[[str], FakeTensorRT]) -> None:
    """TensorRT chooses kernels by their times on a card: one of the same compute capability and another model is another one."""
    options = changed(options, engines=("tensorrt",), force=True)
    tensorrt("NVIDIA GeForce RTX 4070")
    before = build(options)[0]
    assert not build(options)[1]
    tensorrt("NVIDIA GeForce RTX 4090")
    with pytest.raises(BuildError, match="exists and is kept"):
        build(changed(options, force=False))
    bundle, built = build(options)
    assert built
    assert bundle.manifest.key != before.manifest.key
    for one, other in zip(before.manifest.segments, bundle.manifest.segments, strict=True):
        assert (one.key, one.onnx) == (other.key, other.onnx), "the ONNX file is the same for all"
        assert one.engines["tensorrt"].key != other.engines["tensorrt"].key
        assert other.engines["tensorrt"].targets == ("sm89", "nvidia-geforce-rtx-4090")


def test_engines_of_another_card_are_not_taken_over(options: BuildOptions, tensorrt: Callable[[str], FakeTensorRT]) -> None:
    """Also where something else makes the bundle another one."""
    options = changed(options, engines=("tensorrt",), force=True)
    tensorrt("NVIDIA GeForce RTX 4070")
    names = [segment.name for segment in build(options)[0].manifest.segments]
    steps: list[Step] = []
    tensorrt("NVIDIA GeForce RTX 4090")
    build(changed(options, engines=("tensorrt", "null")), steps.append)
    assert [step.segment for step in steps if step.phase == "compiling for tensorrt"] == names
    steps.clear()
    build(changed(options, engines=("tensorrt",)), steps.append)
    assert {step.phase for step in steps if step.segment} == {"kept"}


BREAKS = [RuntimeError("broke"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]


@pytest.mark.parametrize("error", BREAKS)
def test_a_build_that_fails_leaves_no_bundle_and_is_gone_on_with(
    options: BuildOptions, fake_trace: FakeTrace, error: BaseException
) -> None:
    before = fake_trace(fail_at="mid", error=error)
    with pytest.raises(type(error)):
        build(options)
    assert before == ["text_encoder", *UNET_SEGMENTS[:4]]
    assert names_in(folder_of(options).parent) == [".bundle.building"]
    after = fake_trace()
    bundle, built = build(options)
    assert built
    assert after == [*UNET_SEGMENTS[4:], "vae_decoder", "vae_encoder"]
    bundle.check()
    assert names_in(bundle.folder.parent) == ["bundle"]


def test_what_an_engine_keeps_for_other_builds_lies_beside_the_bundle(
    options: BuildOptions, fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_and_keep(
        engine: object, traced: Traced, stem: Path, profile: Profile, targets: object, cache_dir: Path
    ) -> list[Path]:
        with (cache_dir / "kept").open("a") as kept:
            kept.write(f"{traced.segment.name} ")
        return []

    fake_trace()
    monkeypatch.setattr(OnnxRuntime, "compile", compile_and_keep)
    bundle, _ = build(options)
    assert names_in(bundle.folder.parent) == ["bundle", "kept"]
    assert (bundle.folder.parent / "kept").read_text().split() == ["text_encoder", *UNET_SEGMENTS, "vae_decoder", "vae_encoder"]


def test_a_build_that_fails_at_once_leaves_nothing(options: BuildOptions, fake_trace: FakeTrace) -> None:
    fake_trace(fail_at="text_encoder", error=RuntimeError("broke"))
    with pytest.raises(RuntimeError):
        build(options)
    assert not folder_of(options).parent.exists()


@pytest.mark.parametrize("error", BREAKS)
def test_a_forced_build_that_fails_keeps_the_old_bundle(
    options: BuildOptions, fake_trace: FakeTrace, error: BaseException
) -> None:
    fake_trace()
    build(options)
    before = contents(folder_of(options))
    fake_trace(fail_at="mid", error=error)
    with pytest.raises(type(error)):
        build(changed(options, precision="fp16", force=True))
    assert contents(folder_of(options)) == before
    assert names_in(folder_of(options).parent) == [".bundle.building", "bundle"]
    Bundle.open(folder_of(options)).check()


def test_a_failure_at_the_very_end_keeps_the_old_bundle(
    options: BuildOptions, fake_trace: FakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old bundle has stepped aside, where folders cannot be exchanged, and the new one cannot take its place."""
    monkeypatch.setattr("engines.support.files._exchange", lambda one, other: False)
    fake_trace()
    build(options)
    before = contents(folder_of(options))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if Path(target) == folder_of(options) and self.name != "old":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        build(changed(options, precision="fp16", force=True))
    monkeypatch.undo()
    assert contents(folder_of(options)) == before
    assert names_in(folder_of(options).parent) == [".bundle.building", "bundle"]


def test_the_default_folder_is_named_after_source_and_variant() -> None:
    assert BuildOptions(source="mini", variant="assembled").folder == Path("bundles/mini-assembled")
    assert BuildOptions(source="someone/some-model").folder == Path("bundles/some-model-original")
    assert BuildOptions(source="/models/mine/").folder == Path("bundles/mine-original")


def test_smaller_segments_run_more_plans(tiny_source: Path) -> None:
    graph = load_graph(open_source(str(tiny_source), "original"), "original", torch.float32)
    plan = plan_inheriting("up.0.layer.0.resnet")
    by_block, by_unit = (make_manifest(units=graph.units, segments=segments_of(graph, size)) for size in ("block", "unit"))
    with pytest.raises(PlanError, match="in one segment"):
        check(plan, by_block)
    check(plan, by_unit)


def test_a_bundle_can_be_cut_for_a_plan_file(options: BuildOptions, fake_trace: FakeTrace, tmp_path: Path) -> None:
    fake_trace()
    path = tmp_path / "inner.json"
    plan = plan_inheriting("up.0.layer.0.resnet")
    path.write_text(plan.model_dump_json())
    plain = build(options)[0].manifest
    with pytest.raises(PlanError, match="in one segment"):
        check(plan, plain)
    cut = build(changed(options, plans=(str(path),), force=True))[0].manifest
    check(plan, cut)
    assert len(cut.segments) > len(plain.segments)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_program_for_the_torch_engine_on_a_full_disk_is_an_error_not_an_abort(tmp_path: Path) -> None:
    segment = Segment(name="relu", units=("relu",), inputs=("x",), outputs=("relu",))
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 3),))
    (tmp_path / "relu.pt2").symlink_to("/dev/full")
    traced = Traced(segment, tmp_path / "relu.onnx", program)
    with pytest.raises(OSError, match="No space left on device"):
        make_engine("torch").compile(traced, tmp_path / "relu", Profile({}, {}, {}), ())
