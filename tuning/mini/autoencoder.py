"""Stages `vae` and `decoder`: an autoencoder for the rendered pictures, then its decoder alone with the encoder frozen.

32 px crops come first, whole pictures later; the foreground counts three times. After the first stage the latents are
whitened per channel by editing the two 1 x 1 convolutions at the bottleneck, which changes no reconstruction.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from tuning.checkpoints.folder import save_part
from tuning.mini.data import batch
from tuning.mini.reader_score import read_scenes
from tuning.training.distributed import Workers
from tuning.training.noising import generator

__all__ = ["AutoencoderTask", "reconstruct", "whiten"]

_CROP = 32
_FOREGROUND = 3.0
_CROP_SHARE = 0.35  # this share of the first stage sees crops
_KL = 1e-4
_LATENT_NOISE = 0.08  # standard deviations of noise that the decoder learns to ignore in the second stage


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pictures: Tensor, size: int = 64) -> Tensor:
    """Encodes and decodes (n, 3, h, w) pictures in [-1, 1], `size` at a time."""
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in pictures.split(size)]
    return torch.cat(parts).clamp_(-1, 1)


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Makes each latent channel of these pictures zero-mean with deviation 1, in place; reconstructions stay the same."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(64)])
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    inward, outward, n = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:n] /= deviation[:, None, None, None]
    inward.bias[:n] = (inward.bias[:n] - mean) / deviation
    inward.bias[n:] -= 2 * deviation.log()
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight *= deviation[None, :, None, None]
    vae.register_to_config(scaling_factor=1.0)


def _weights(pictures: Tensor) -> Tensor:
    """(n, 1, h, w): _FOREGROUND where the picture differs from its corner or is next to that, else 1; mean 1."""
    differs = (pictures - pictures[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.02
    near = nn.functional.max_pool2d(differs.float(), 5, stride=1, padding=2)
    weights = 1 + (_FOREGROUND - 1) * near
    return weights / weights.mean()


class AutoencoderTask:
    """Trains the whole autoencoder (`decoder_only` False), or the decoder on the frozen encoder's latents."""

    def __init__(
        self,
        vae: AutoencoderKL,
        size: int,
        folder: Path,
        workers: Workers,
        *,
        decoder_only: bool = False,
        validation: int = 512,
    ) -> None:
        self.name = "decoder" if decoder_only else "vae"
        self.module: nn.Module = vae
        self._vae, self._size, self._folder, self._workers = vae, size, folder, workers
        self._decoder_only, self._validation = decoder_only, validation
        vae.to(workers.device, memory_format=torch.channels_last)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(not decoder_only)

    def _pictures(self, step: int, progress: float) -> tuple[Tensor, Tensor]:
        crops = not self._decoder_only and progress < _CROP_SHARE
        size = self._size * 4 if crops else self._size
        pictures = batch(size, f"{self.name} {step} {self._workers.rank}")[2]
        weights = _weights(pictures)
        if crops:
            at = torch.randint(0, 64 - _CROP + 1, (size, 2), generator=generator(1, step, self._workers.rank)).tolist()
            both = torch.cat([pictures, weights], 1)
            both = torch.stack([p[:, y : y + _CROP, x : x + _CROP] for p, (y, x) in zip(both, at, strict=True)])
            pictures, weights = both[:, :3], both[:, 3:]
        device = self._workers.device
        return pictures.to(device, memory_format=torch.channels_last), weights.to(device)

    def loss(self, step: int, progress: float) -> dict[str, Tensor]:
        """Weighted absolute and squared error, and a little KL while the encoder learns."""
        pictures, weights = self._pictures(step, progress)
        noise = generator(2, step, self._workers.rank)
        if self._decoder_only:
            with torch.no_grad():
                latents = self._vae.encode(pictures).latent_dist.mode()
                latents = latents + _LATENT_NOISE * torch.randn(latents.shape, generator=noise).to(latents)
            kl = torch.zeros((), device=latents.device)
        else:
            posterior = self._vae.encode(pictures).latent_dist
            latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=noise).to(pictures)
            kl = posterior.kl().mean() / posterior.mean[0].numel()
        error = self._vae.decode(latents).sample - pictures
        loss = (weights * (error.abs() + 2 * error**2)).mean() + _KL * kl
        return {"loss": loss, "psnr": -10 * torch.log10((error.detach() ** 2).mean() / 4), "kl": kl.detach()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Peak signal-to-noise ratio in dB, and what the rule reader gets right on held-back reconstructions."""
        scenes, _, pictures = batch(self._validation, "vae validation", held=True)
        again = reconstruct(self._vae, pictures.to(self._workers.device)).cpu()
        psnr = -10 * torch.log10(((again - pictures) ** 2).mean() / 4)
        return {"valid_psnr": float(psnr)} | {f"reader_{k}": v for k, v in read_scenes(scenes, again).items()}

    def export(self) -> None:
        """Writes the model folder's vae/ from the second stage on: before it, the latents are not whitened yet."""
        if self._decoder_only:
            save_part(self._vae, self._folder / "vae")
