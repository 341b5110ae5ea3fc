"""Stages `vae` and `decoder` of the emoji training: an autoencoder, whitened; then its decoder alone, the encoder frozen.

Crops come first, whole pictures in the second half.
"""

import random
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from tuning.checkpoints.folder import save_part
from tuning.emoji.pictures import SIZE, Textures
from tuning.emoji.run import Log, Rates, Run, autocast, due
from tuning.mini.autoencoder import reconstruct, whiten
from tuning.mini.models import new_vae
from tuning.training.curves import write_grid

__all__ = ["WIDTHS", "load_vae", "train_decoder", "train_vae"]

WIDTHS = (24, 48, 96, 96)
_CROP = SIZE // 2
_KL = 1e-4
_LATENT_NOISE = 0.06  # standard deviations of noise that the decoder learns to ignore
_MARKS = tuple(i / 10 for i in range(1, 10))
_VALIDATION = 128


def load_vae(folder: Path, device: torch.device) -> AutoencoderKL:
    """The autoencoder of a model folder, float32, in evaluation mode."""
    vae: AutoencoderKL = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return vae.to(device, memory_format=torch.channels_last).eval()


def _error(made: Tensor, wanted: Tensor) -> Tensor:
    """Absolute and squared error, and that of the slopes, so that edges stay where they are."""
    error = (made - wanted).float()
    slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes


def _report(vae: AutoencoderKL, data: Textures, out: Path, log: Log, step: int) -> None:
    """Logs the PSNR in dB of held-back pictures encoded and decoded, and draws the first of them."""
    with torch.no_grad():
        valid = data.held_back(_VALIDATION)
        again = reconstruct(vae, valid)
    psnr = (-10 * torch.log10((again - valid).square().mean((1, 2, 3)) / 4)).mean()
    write_grid(torch.cat([valid[:16], again[:16]]).clamp(-1, 1).cpu(), out / "training" / "vae.png", 16)
    log(step=step, held_back_psnr=round(float(psnr), 2))


def train_vae(
    data: Textures,
    out: Path,
    log: Log,
    batch: int,
    *,
    widths: tuple[int, ...] = WIDTHS,
    whitened_on: int = 2048,
    **bounds: Any,
) -> None:
    """Trains the whole autoencoder, makes the latents of so many drawings white, and writes it.

    It begins from the one in `out`, where there is one.
    """
    vae = load_vae(out, data.device) if (out / "vae").exists() else new_vae(widths, SIZE).to(data.device)
    vae.to(memory_format=torch.channels_last).train()
    rates = Rates(2e-3, fall=0.7, weight_decay=0.0, average=0.998)
    run = Run(vae, rates, out / "checkpoints" / "vae.pt", **bounds)
    rng, shown = random.Random(f"vae {run.step}"), set[float]()
    for progress in run.steps():
        pictures = data.batch(batch, rng)
        if progress < 0.5:
            top, left = (rng.randrange(SIZE - _CROP + 1) for _ in range(2))
            pictures = pictures[:, :, top : top + _CROP, left : left + _CROP]
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with autocast(data.device):
            posterior = vae.encode(pictures).latent_dist
            made = vae.decode(posterior.sample()).sample
        loss = _error(made, pictures) + _KL * posterior.kl().float().mean() / posterior.mean[0].numel()
        run.update(loss)
        if due(progress, _MARKS, shown):
            log(step=run.step, pictures=(run.step + 1) * batch, loss=round(float(loss.detach()), 4))
    with run.averaged():
        vae.eval()
        whiten(vae, torch.cat([data.batch(min(64, whitened_on), rng) for _ in range(-(-whitened_on // 64))]))
        _report(vae, data, out, log, run.step)
        save_part(vae, out / "vae")


def train_decoder(data: Textures, out: Path, log: Log, batch: int, **bounds: Any) -> None:
    """Trains the decoder on noisy latents of the frozen encoder; writes the autoencoder now and then."""
    vae = load_vae(out, data.device)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(False)
    rates = Rates(1e-3, fall=0.9, weight_decay=0.0, average=0.998)
    run = Run(vae, rates, out / "checkpoints" / "decoder.pt", **bounds)
    rng, shown = random.Random(f"decoder {run.step}"), set[float]()
    for progress in run.steps():
        pictures = data.batch(batch, rng).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(data.device):
            latents = vae.encode(pictures).latent_dist.mode()
        latents = latents + _LATENT_NOISE * torch.randn_like(latents)
        if progress < 0.5:
            top, left = (rng.randrange((SIZE - _CROP) // 8 + 1) for _ in range(2))
            latents = latents[:, :, top : top + _CROP // 8, left : left + _CROP // 8]
            pictures = pictures[:, :, 8 * top : 8 * top + _CROP, 8 * left : 8 * left + _CROP]
        with autocast(data.device):
            made = vae.decode(latents).sample
        run.update(_error(made, pictures))
        if due(progress, _MARKS, shown):
            with run.averaged():
                _report(vae, data, out, log, run.step)
    with run.averaged():
        _report(vae, data, out, log, run.step)
        save_part(vae, out / "vae")
