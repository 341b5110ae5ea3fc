"""One denoising step of a bundle with plain ONNX Runtime, by following its manifest: nothing of unet-heirloom is imported.

python docs/one_step.py bundles/emoji-original "anchor, twitter style"
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from transformers import CLIPTokenizer

if len(sys.argv) != 3:
    sys.exit("give a bundle's folder and a prompt: python docs/one_step.py bundles/emoji-original 'anchor, twitter style'")
folder, prompt = Path(sys.argv[1]), sys.argv[2]
manifest = json.loads((folder / "manifest.json").read_text())
scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

# A prompt's tokens, cut and padded to the length that the text encoder takes.
tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
tokens = tokenizer(prompt, padding="max_length", max_length=manifest["text_length"], truncation=True, return_tensors="np")

# Noise of the bundle's first size, at the noisiest timestep.
timestep = scheduler["num_train_timesteps"] - 1
size = [side // manifest["vae_scale"] for side in manifest["sizes"][0]]
sample = np.random.default_rng(0).standard_normal((1, manifest["latent_channels"], *size)).astype(np.float32)
features = {"tokens": tokens["input_ids"].astype(np.int64), "sample": sample, "timestep": np.array([timestep], np.float32)}

# Every segment whose inputs are there, in the manifest's order: the text encoder, then the UNet from stem to head.
for segment in manifest["segments"]:
    if set(segment["inputs"]) <= features.keys():
        session = onnxruntime.InferenceSession(folder / segment["onnx"][0]["path"])
        made = session.run(segment["outputs"], {name: features[name] for name in segment["inputs"]})
        features |= dict(zip(segment["outputs"], made, strict=True))

# A deterministic step (DDIM) to timestep 0: with all noise taken away, what is left is the model's guess at the picture.
betas = np.linspace(scheduler["beta_start"] ** 0.5, scheduler["beta_end"] ** 0.5, timestep + 1) ** 2
signal = np.prod(1 - betas)
out, weight = features["head"], (signal**0.5, (1 - signal) ** 0.5)
if scheduler.get("prediction_type") == "v_prediction":  # what early configurations leave out is noise
    latents = weight[0] * sample - weight[1] * out
else:
    latents = (sample - weight[1] * out) / weight[0]
print("predicted latents", latents.shape, "mean", latents.mean((0, 2, 3)).round(3), "deviation", latents.std().round(3))
