"""The example in docs/ that drives a bundle without us makes what diffusers makes."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from engines import Bundle
from tests.support.reference import MINI

SCRIPT = Path("docs/one_step.py")


@pytest.mark.slow
def test_one_step_follows_the_manifest(mini_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(mini_bundle.folder), "a small red star"])
    made = runpy.run_path(str(SCRIPT))
    text = CLIPTextModel.from_pretrained(MINI / "text_encoder", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(MINI / "unet", torch_dtype=torch.float32)
    sample = torch.from_numpy(made["sample"])
    with torch.no_grad():
        states = text(torch.from_numpy(np.asarray(made["tokens"]["input_ids"]))).last_hidden_state
        predicted = unet(sample, made["timestep"], states).sample
    scheduler = DDIMScheduler.from_pretrained(MINI / "scheduler")
    scheduler.set_timesteps(1000)
    expected = scheduler.step(predicted, made["timestep"], sample).pred_original_sample
    assert made["latents"] == pytest.approx(expected.numpy(), abs=1e-4 * float(expected.abs().max()))


def test_a_scheduler_of_an_early_checkpoint(mini_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its configuration does not name what the UNet predicts, which is the noise."""
    folder = shutil.copytree(mini_bundle.folder, tmp_path / "bundle")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    del config["prediction_type"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(folder), "a small red star"])
    made = []
    for kind in ({"prediction_type": "epsilon"}, {"prediction_type": "v_prediction"}, {}):
        path.write_text(json.dumps({**config, **kind}))
        made.append(runpy.run_path(str(SCRIPT))["latents"])
    assert (made[2] == made[0]).all()
    assert (made[2] != made[1]).any()


def test_the_example_imports_nothing_of_ours() -> None:
    listing = "import sys, runpy; sys.argv = ['x', 'nowhere', 'y']\ntry: runpy.run_path(%r)\nexcept OSError: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing % str(SCRIPT)], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "onnxruntime" in loaded
    assert not loaded & {"engines", "exporter", "runtime", "tuning"}


def test_without_arguments_it_says_which() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("give a bundle's folder and a prompt")
    assert done.stderr.count("\n") == 1
