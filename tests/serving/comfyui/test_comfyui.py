"""The nodes for ComfyUI: against stand-ins for its modules, and against the real one where COMFYUI names its folder.

COMFYUI_PYTHON is the interpreter to run that with, one that has its requirements and this project.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engines import Bundle, BundleError, EngineError
from runtime import PlanError, RequestError, UNet
from serving.comfyui.bundle_module import is_guided
from tests.support.fake_comfyui import install

pytestmark = pytest.mark.shared_pieces
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def nodes(mini_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The nodes by name, as ComfyUI finds them in the folder that it is given."""
    (tmp_path / "unet_heirloom").mkdir()
    (tmp_path / "unet_heirloom/mini").symlink_to(mini_bundle.folder)
    install(tmp_path, monkeypatch)
    spec = importlib.util.spec_from_file_location("custom_node", ROOT / "comfyui/__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
    return dict(module.NODE_CLASS_MAPPINGS)


class Run:
    """A sampler's calls: a few noise levels, rows of both halves of guidance."""

    def __init__(self, model: Any, text: Tensor, steps: int = 6, **options: Any) -> None:
        self.unet, self.text = model.model.diffusion_model, text
        self.sampling = model.model.model_sampling
        self.sigmas = torch.cat([self.sampling.sigmas[torch.linspace(999, 1, steps).long()], torch.zeros(1)])
        self.options = {**model.model_options["transformer_options"], "sample_sigmas": self.sigmas, **options}

    def call(self, number: int, halves: tuple[int, ...] = (1, 0), **given: Any) -> Tensor:
        x = torch.randn(len(halves), 4, 8, 8, generator=torch.Generator().manual_seed(number))
        return self.at(self.sigmas[number], x, halves, **given)

    def at(self, sigma: Tensor, x: Tensor, halves: tuple[int, ...] = (1, 0), **given: Any) -> Tensor:
        options = {**self.options, "cond_or_uncond": list(halves), "uuids": list(halves), **given.pop("options", {})}
        timestep = self.sampling.timestep(sigma.repeat(len(x))).float()
        given = {"context": self.text[: len(x)], "control": None, "transformer_options": options, **given}
        found: Tensor = self.unet(x, timestep, **given)
        return found

    @property
    def kinds(self) -> list[list[str]]:
        """Of each group of rows, the kinds of its last call's steps."""
        return [[record.kind for record in unet.steps] for unet in self.unet._unets.values()]


@pytest.fixture
def loaded(nodes: dict[str, Any]) -> tuple[Any, Any]:
    model, bundle = nodes["UNetHeirloomLoadBundle"]().load("mini", "onnxruntime")
    return model, bundle


@pytest.fixture
def text(nodes: dict[str, Any], loaded: tuple[Any, Any]) -> Tensor:
    encode = nodes["UNetHeirloomEncode"]().encode
    rows = [encode(loaded[1], prompt)[0][0][0] for prompt in ("", "a red star on a blue background")]
    assert [row.shape for row in rows] == [(1, 32, 128)] * 2
    return torch.cat(rows)


def test_every_node_says_what_comfyui_asks_of_it(nodes: dict[str, Any]) -> None:
    for node in nodes.values():
        assert set(node.INPUT_TYPES()) <= {"required", "optional"}
        assert callable(getattr(node, node.FUNCTION))
        assert node.RETURN_TYPES
        assert node.CATEGORY
    lists = nodes["UNetHeirloomLoadBundle"].INPUT_TYPES()["required"]
    assert lists["bundle"] == (["mini"],)
    assert "onnxruntime" in lists["engine"][0]
    assert "deepcache:3" in nodes["UNetHeirloomChoosePlan"].INPUT_TYPES()["required"]["plan"][0]
    changed = nodes["UNetHeirloomLoadBundle"].IS_CHANGED
    assert (len(changed("mini", "torch")), changed("none", "torch")) == (64, "")


def test_the_model_is_of_the_bundles_kind(loaded: tuple[Any, Any]) -> None:
    model = loaded[0].model
    assert (model.model_type, model.latent_format.scale_factor) == ("v", 0.18215)
    assert model.model_sampling.sigmas[0] == pytest.approx(0.0292, abs=1e-3)  # of SD's schedule of noise
    assert model.model_sampling.sigmas[-1] == pytest.approx(14.61, abs=1e-2)


def test_a_run_inherits_as_its_plan_says_and_predicts_as_runtimes_unet(
    nodes: dict[str, Any], loaded: tuple[Any, Any], text: Tensor, mini_bundle: Bundle
) -> None:
    (model,) = nodes["UNetHeirloomChoosePlan"]().choose(loaded[0], "other", " deepcache:3 ")
    run = Run(model, text)
    timesteps = run.sampling.timestep(run.sigmas[:-1]).float()
    unet = UNet(mini_bundle.folder, "deepcache:3")
    for number in range(6):
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(number))
        torch.testing.assert_close(run.call(number), unet(x, timesteps[number], text)[0])
    assert run.kinds == [["key", "inherit", "inherit"] * 2]
    assert loaded[0].model_options["transformer_options"] == {}, "the MODEL before it keeps its own plan"
    whole = Run(loaded[0], text)
    for number in range(3):
        whole.call(number)
    assert whole.kinds == [["key"] * 3]


def test_halves_that_are_evaluated_one_after_another_inherit_each_from_its_own(
    nodes: dict[str, Any], loaded: tuple[Any, Any], text: Tensor
) -> None:
    (model,) = nodes["UNetHeirloomChoosePlan"]().choose(loaded[0], "deepcache:3")
    run = Run(model, text)
    for number in range(4):
        run.call(number, (0,))
        run.call(number, (1,))
    assert run.kinds == [["key", "inherit", "inherit", "key"]] * 2


def test_levels_that_come_twice_or_in_between_are_right_and_inherit_nothing_wrong(
    nodes: dict[str, Any], loaded: tuple[Any, Any], text: Tensor
) -> None:
    (model,) = nodes["UNetHeirloomChoosePlan"]().choose(loaded[0], "deepcache:3")
    run, whole = Run(model, text), Run(loaded[0], text)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    run.call(0)
    run.call(1)
    for sigma in (run.sigmas[1], (run.sigmas[1] + run.sigmas[2]) / 2):
        found = run.at(sigma, x)
        torch.testing.assert_close(found, whole.at(sigma, x))


def test_another_run_begins_with_a_key_step(nodes: dict[str, Any], loaded: tuple[Any, Any], text: Tensor) -> None:
    (model,) = nodes["UNetHeirloomChoosePlan"]().choose(loaded[0], "deepcache:3")
    for _ in range(2):
        run = Run(model, text)
        run.call(0)
        run.call(1)  # and it is broken off
        assert run.kinds == [["key", "inherit"]]
    run.call(0)  # the same levels once more
    assert run.kinds == [["key"]]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"control": {"output": []}}, "a ControlNet is applied"),
        ({"crossattn_controlnet": torch.zeros(1)}, "a ControlNet is applied"),
        ({"y": torch.zeros(2, 2816)}, "pooled text"),
        ({"context": torch.zeros(2, 77, 768)}, "text features of width 768; this bundle takes width 128"),
        ({"context": None}, "text features none"),
        ({"guidance": torch.zeros(1)}, "does not take guidance"),
        ({"options": {"patches": {"attn1_patch": [print]}}}, "changes layers of the UNet (attn1_patch)"),
        ({"options": {"patches_replace": {"attn2": {}}}}, "(attn2)"),
        ({"options": {"wrappers": {"diffusion_model": {"cache": [print]}}}}, "(cache)"),
    ],
)
def test_what_a_bundle_cannot_take_is_told(loaded: tuple[Any, Any], text: Tensor, given: dict[str, Any], part: str) -> None:
    with pytest.raises(RequestError, match=part.replace("(", r"\(").replace(")", r"\)")):
        Run(loaded[0], text).call(0, **given)


@pytest.mark.parametrize("channels", [9, 16])
def test_latents_of_other_models_are_told(loaded: tuple[Any, Any], text: Tensor, channels: int) -> None:
    run = Run(loaded[0], text)
    with pytest.raises(RequestError, match=r"this bundle takes \(rows, 4, height, width\).*Set Latent Noise Mask"):
        run.at(run.sigmas[0], torch.zeros(2, channels, 8, 8))


def test_areas_that_do_not_fit_and_unlike_noise_levels_are_told(loaded: tuple[Any, Any], text: Tensor) -> None:
    run = Run(loaded[0], text)
    with pytest.raises(RequestError, match=r"Conditioning Set Area\) of 64x32 pixels, height first; .* multiples of 64"):
        run.at(run.sigmas[0], torch.zeros(2, 4, 8, 4))
    unet, timesteps = run.unet, torch.tensor([500.0, 400.0])
    with pytest.raises(RequestError, match="unlike noise levels"):
        unet(torch.zeros(2, 4, 8, 8), timesteps, context=text, transformer_options=run.options)
    assert loaded[0].model.channels == loaded[1].manifest.features["stem"].shape[1], "FreeU asks for it before it is refused"


@pytest.mark.parametrize("name", ["damaged", "of another engine", "empty"])
def test_bundles_that_cannot_be_loaded_are_told(nodes: dict[str, Any], bundle_copy: Path, tmp_path: Path, name: str) -> None:
    place = tmp_path / "unet_heirloom/bad"
    place.symlink_to(bundle_copy)
    if name == "damaged":
        next(bundle_copy.glob("segments/*.onnx")).write_bytes(b"damaged")
    elif name == "empty":
        (bundle_copy / "manifest.json").write_text("{}")
    with pytest.raises((BundleError, EngineError)) as refused:
        nodes["UNetHeirloomLoadBundle"]().load("bad", "tensorrt-rtx" if name == "of another engine" else "onnxruntime")
    assert "\n" not in refused.value.line


def test_mistakes_with_the_nodes_are_told(nodes: dict[str, Any], loaded: tuple[Any, Any]) -> None:
    choose, load = nodes["UNetHeirloomChoosePlan"]().choose, nodes["UNetHeirloomLoadBundle"]().load
    with pytest.raises(PlanError, match="blok"):
        choose(loaded[0], "other", "blok:3")
    loaded[0].model.diffusion_model = torch.nn.Identity()
    with pytest.raises(BundleError, match="connect Load Bundle"):
        choose(loaded[0], "full")
    with pytest.raises(BundleError, match="is no name of a bundle"):
        load("../mini", "onnxruntime")
    with pytest.raises(BundleError, match="no such folder|no bundle"):
        load("none", "onnxruntime")


def test_latents_are_decoded_to_pictures(nodes: dict[str, Any], loaded: tuple[Any, Any]) -> None:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    (images,) = nodes["UNetHeirloomDecode"]().decode(loaded[1], {"samples": latents / 0.18215})
    expected = np.stack([np.asarray(image, np.float32) / 255 for image in loaded[1].decode(latents)])
    assert images.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(images.numpy(), expected, atol=1.01 / 255)


def test_guidance_is_told_by_the_order_of_its_halves() -> None:
    assert [is_guided(halves) for halves in ([1, 0], [0, 1], [0], [1, 0, 0], [])] == [True, False, False, False, False]


_REAL = """
import json, sys
from pathlib import Path
folder, repository, models = sys.argv[1:4]
sys.path[:0] = [folder, repository]
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import folder_paths, nodes
folder_paths.models_dir = models
import importlib.util
spec = importlib.util.spec_from_file_location("custom_node", Path(repository) / "comfyui/__init__.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
ours = module.NODE_CLASS_MAPPINGS
model, bundle = ours["UNetHeirloomLoadBundle"]().load("mini", "onnxruntime")
(model,) = ours["UNetHeirloomChoosePlan"]().choose(model, "deepcache:3")
positive, negative = (ours["UNetHeirloomEncode"]().encode(bundle, text)[0] for text in ("a red star on a blue background", ""))
latent = nodes.EmptyLatentImage().generate(64, 64, 1)[0]
(made,) = nodes.KSampler().sample(model, 7, 20, 3.0, "euler", "normal", positive, negative, latent, 1.0)
(image,) = ours["UNetHeirloomDecode"]().decode(bundle, made)
kinds = [[record.kind for record in unet.steps] for unet in model.model.diffusion_model._unets.values()]
print(json.dumps({"kinds": kinds, "centre": image[0, 32, 32].tolist(), "corner": image[0, 4, 4].tolist()}))
"""


@pytest.mark.skipif("COMFYUI" not in os.environ, reason="COMFYUI names no folder of ComfyUI")
def test_a_picture_by_the_real_ksampler(mini_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "unet_heirloom").mkdir()
    (tmp_path / "unet_heirloom/mini").symlink_to(mini_bundle.folder)
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    given = [python, "-c", _REAL, os.environ["COMFYUI"], str(ROOT), str(tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert [(len(kinds), kinds.count("key")) for kinds in told["kinds"]] == [(20, 7)]
    assert np.argmax(told["centre"]) == 0, "the star is red"
    assert np.argmax(told["corner"]) == 2, "the background is blue"
