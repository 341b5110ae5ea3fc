"""Numbers that are not finite never become a picture without a word: step, segment, precision and remedy are named."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import Bundle, Runner, make_engine
from runtime import NonFiniteError, Pipeline
from runtime.execution.loaded_bundle import LoadedBundle
from tests.support.diffusers_pipelines import PROMPT, mask, picture
from tests.support.reference import MINI

pytestmark = pytest.mark.shared_pieces


class Spoiling(Runner):
    """A runner whose output has one NaN from its n-th run of every call on."""

    def __init__(self, runner: Runner, good_runs: int, value: float) -> None:
        super().__init__(runner.segment, runner.features)
        self._runner, self._left, self._good, self._value = runner, good_runs, good_runs, value
        self.device = runner.device

    def start(self) -> None:
        self._left = self._good

    def run(self, inputs: Any) -> dict[str, Tensor]:
        outputs = {name: tensor.clone() for name, tensor in self._runner.run(inputs).items()}
        self._left -= 1
        if self._left < 0:
            for tensor in outputs.values():
                tensor.view(-1)[0] = self._value
        return outputs

    def _run_impl(self, inputs: dict[str, Tensor], sizes: dict[str, int]) -> dict[str, Tensor]:
        raise NotImplementedError


def spoilt(made: Pipeline, segment: str, good_runs: int = 0, value: float = float("nan")) -> Pipeline:
    """The same pipeline with one segment that goes wrong at a step of every call."""
    changed = Pipeline.__new__(Pipeline)
    changed.__dict__.update(made.__dict__)
    runner = Spoiling(made.network.runners[segment], good_runs, value)
    changed.network = LoadedBundle(made.manifest, {**made.network.runners, segment: runner})
    changed.networks = {made.manifest.variant: changed.network}
    prepare = changed.prepare

    def restarted(request: Any) -> Any:
        runner.start()
        return prepare(request)

    changed.prepare = restarted  # type: ignore[method-assign]
    return changed


@pytest.mark.parametrize(
    ("segment", "good", "value", "where"),
    [
        ("up.1", 2, float("nan"), "step 2 of 4: segment up.1 "),
        ("stem", 0, float("inf"), "step 0 of 4: segment stem "),
        ("head", 3, float("-inf"), "step 3 of 4: segment head "),
        ("text_encoder", 0, float("nan"), "segment text_encoder "),
        ("vae_decoder", 0, float("nan"), "segment vae_decoder "),
        ("vae_encoder", 0, float("inf"), "segment vae_encoder "),
    ],
)
def test_the_first_segment_that_goes_wrong_is_named(
    mini_pipeline: Pipeline, segment: str, good: int, value: float, where: str
) -> None:
    options: dict[str, Any] = {"image": picture(), "strength": 1.0} if segment == "vae_encoder" else {}
    with pytest.raises(NonFiniteError) as refusal:
        spoilt(mini_pipeline, segment, good, value).generate(PROMPT, steps=4, scheduler="ddim", **options)
    assert str(refusal.value).startswith(f"{where}gave numbers that are not finite (fp32)")
    assert "fp32 has room" in refusal.value.__notes__[0]


def test_a_picture_that_inpainting_takes_back_is_looked_at_too(mini_pipeline: Pipeline) -> None:
    """Of full strength it starts from noise alone: what the encoder made of the picture comes after the first step."""
    with pytest.raises(NonFiniteError, match="^segment vae_encoder gave numbers that are not finite"):
        spoilt(mini_pipeline, "vae_encoder").generate(
            PROMPT, steps=2, scheduler="ddim", image=picture(), mask=mask(), strength=1.0
        )


def test_a_callback_that_spoils_the_latents_is_named(mini_pipeline: Pipeline) -> None:
    """The second run, which looks for the segment, has the same noise, though it came from a generator of the user's."""

    def spoil(record: Any, latents: Tensor) -> None:
        latents.fill_(float("inf"))

    generator = torch.Generator().manual_seed(3)
    once = torch.Generator().manual_seed(3)
    mini_pipeline.generate(PROMPT, steps=2, generator=once)
    with pytest.raises(NonFiniteError) as refusal:
        mini_pipeline.generate(PROMPT, steps=2, callback=spoil, generator=generator)
    assert str(refusal.value).startswith("a callback, without which all numbers are finite, gave numbers that are not finite")
    assert not getattr(refusal.value, "__notes__", [])
    assert torch.equal(generator.get_state(), once.get_state())


def test_with_allow_nonfinite_it_is_a_warning(mini_pipeline: Pipeline) -> None:
    broken = spoilt(mini_pipeline, "vae_decoder")
    with pytest.warns(UserWarning, match="segment vae_decoder gave numbers that are not finite"):
        made = broken.generate(PROMPT, steps=2, allow_nonfinite=True)
    assert made.image.getpixel((0, 0))[0] == 0  # type: ignore[index]
    assert made.image.getextrema() != ((0, 0), (0, 0), (0, 0)), "the rest of it is there"


def in_half_precision(broken: Pipeline) -> Pipeline:
    """The pipeline, whose bundle says that it was built in fp16."""
    manifest = broken.manifest.model_copy(update={"precision": "fp16"})
    broken.bundle = dataclasses.replace(broken.bundle, manifest=manifest)
    return broken


def test_in_half_precision_the_remedy_is_a_command(mini_pipeline: Pipeline) -> None:
    broken = in_half_precision(spoilt(mini_pipeline, "up.2"))
    with pytest.raises(NonFiniteError, match=r"segment up.2 gave numbers that are not finite \(fp16\)") as refusal:
        broken.generate(PROMPT, steps=2)
    assert "build the bundle in fp32: python -m exporter build" in refusal.value.__notes__[0]
    assert "--precision fp32" in refusal.value.__notes__[0]


def test_where_the_vae_overflows_the_vae_alone_is_built_anew(mini_pipeline: Pipeline) -> None:
    broken = in_half_precision(spoilt(mini_pipeline, "vae_decoder", value=float("inf")))
    with pytest.raises(NonFiniteError, match=r"segment vae_decoder gave numbers that are not finite \(fp16\)") as refusal:
        broken.generate(PROMPT, steps=2)
    assert "build the VAE in fp32: python -m exporter build" in refusal.value.__notes__[0]
    assert "--precision fp16 --vae-precision fp32" in refusal.value.__notes__[0]


def test_nothing_is_looked_at_while_all_is_well(mini_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every look would wait for the device: there are two, after the last step."""
    looks: list[int] = []
    isfinite = torch.isfinite

    def counted(tensor: Tensor) -> Tensor:
        looks.append(tensor.numel())
        return isfinite(tensor)

    monkeypatch.setattr(torch, "isfinite", counted)
    made = mini_pipeline.generate(PROMPT, steps=4)
    assert looks == [made.latents.numel(), made.latents.numel() * 64 * 3 // 4]


@pytest.mark.slow
def test_a_decoder_that_overflows_in_half_precision(tmp_path: Path) -> None:
    """A real build: the decoder's first convolution scaled by a million."""
    from exporter import BuildOptions, build

    shutil.copytree(MINI, tmp_path / "source")
    path = next((tmp_path / "source" / "vae").glob("*.safetensors"))
    weights = load_file(path)
    weights["decoder.conv_in.weight"] = weights["decoder.conv_in.weight"] * 1e6
    save_file(weights, path, {"format": "pt"})
    options = BuildOptions(
        source=str(tmp_path / "source"), precision="fp16", granularity=None, plans=("full",), out=tmp_path / "bundle"
    )
    bundle = build(options)[0]
    pipeline = Pipeline(Bundle.open(bundle.folder), make_engine("onnxruntime"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(NonFiniteError, match=r"^segment vae_decoder gave numbers that are not finite \(fp16\)"):
            pipeline.generate(PROMPT, steps=2)
