"""Stage `unet` of the emoji training: the UNet and the text encoder, jointly, on encoded drawings.

Velocity prediction (Salimans and Ho, arXiv 2202.00512): the squared error, every timestep with the same weight. Captions are
dropped one time in ten. The drawings are made and encoded anew now and then, so that none is learnt by heart.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from tuning.checkpoints.folder import save_part
from tuning.emoji.concepts import caption
from tuning.emoji.pairs import save_pairs
from tuning.emoji.pictures import SIZE, Textures, random_drawing
from tuning.emoji.run import Log, Rates, Run, autocast, due
from tuning.emoji.samples import sample_grids
from tuning.emoji.vae import load_vae
from tuning.mini.models import INDEX, load_tokenizer, new_text_encoder, new_unet, scheduler, train_tokenizer_on
from tuning.training.noising import tokenize

__all__ = ["HEADS", "TEXT_WIDTH", "WIDTHS", "encode_pool", "train_unet"]

WIDTHS = (32, 64, 96, 96)
HEADS = 2  # 16 to 48 channels each: TensorRT fuses attention from 16 on
TEXT_WIDTH = 128
VOCABULARY = 1400
_DROPPED = 0.1
_CHUNK = 512
_LOG_MARKS = tuple(i / 25 for i in range(1, 25))
_POOL_MARKS = (0.25, 0.5, 0.75)


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL, data: Textures, versions: int, tokenizer: CLIPTokenizer, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 16, 16) and token ids (n, length) of every training pair, drawn in so many ways."""
    rows = [row for _ in range(versions) for row in range(len(data.train))]
    latents, texts = [], []
    for at in range(0, len(rows), _CHUNK):
        pictures, drawings = data.draw(rows[at : at + _CHUNK], rng)
        with autocast(data.device):
            mode = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
        latents.append(mode.float())
        texts += [caption(drawing, rng) for drawing in drawings]
    return torch.cat(latents), tokenize(tokenizer, texts).to(data.device)


class _Denoiser(nn.Module):
    """The UNet in mixed precision, as a function of tensors: what is recorded as CUDA graphs."""

    def __init__(self, unet: UNet2DConditionModel, device: torch.device) -> None:
        super().__init__()
        self.unet, self._device = unet, device

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        with autocast(self._device):
            result: Tensor = self.unet(noisy, timesteps, states, return_dict=False)[0]
        return result.float()


def _recorded(
    unet: UNet2DConditionModel, device: torch.device, batch: int, text: tuple[int, int], log: Log
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The UNet's forward and backward passes as CUDA graphs, or as they are where there is no GPU or that fails."""
    module = _Denoiser(unet, device)
    if device.type != "cuda":
        return module
    try:
        sample = (
            torch.randn(batch, 4, SIZE // 8, SIZE // 8, device=device).contiguous(memory_format=torch.channels_last),
            torch.randint(0, 1000, (batch,), device=device),
            torch.randn(batch, *text, device=device, requires_grad=True),
        )
        made: Any = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
        graphed: Callable[[Tensor, Tensor, Tensor], Tensor] = made
        return graphed
    except RuntimeError as error:
        log(no_graph=f"{type(error).__name__}: {error}"[:300])
        return module


def _tokenizer(data: Textures, folder: Path) -> CLIPTokenizer:
    """The model's own: what is there stays, since the text encoder's weights are numbered by it."""
    if (folder / "vocab.json").exists():
        return load_tokenizer(folder)
    rng = random.Random("tokenizer")
    texts = [caption(random_drawing(icon, rng), rng) for icon in data.train for _ in range(2)]
    return train_tokenizer_on(texts, folder, VOCABULARY)


def _begin(module: nn.Module, file: Path, log: Log) -> None:
    """Weights that are in the model folder already."""
    if file.exists():
        module.load_state_dict({name: value.float() for name, value in load_file(file).items()}, strict=False)
        log(begins_from=f"{file.parent.name}/{file.name}")


class _Batches:
    """Noisy latents, timesteps, token ids and the velocities wanted, all drawn on the device."""

    def __init__(self, empty: Tensor, batch: int, device: torch.device) -> None:
        self._empty, self._batch, self._device = empty.to(device), batch, device
        self._alphas = scheduler().alphas_cumprod.to(device)
        self._strata = torch.arange(batch, device=device)

    def __call__(self, latents: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, device = self._batch, self._device
        rows = torch.randint(0, len(latents), (batch,), device=device)
        clean, ids = latents[rows], tokens[rows]
        ids = torch.where(torch.rand(batch, 1, device=device) < _DROPPED, self._empty, ids)
        timesteps = ((self._strata + torch.rand(batch, device=device)) / batch * 1000).long().clamp_(max=999)
        alpha = self._alphas[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        return noisy, timesteps, ids, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean


def train_unet(
    data: Textures,
    out: Path,
    log: Log,
    batch: int,
    *,
    versions: int = 16,
    lr: float = 2e-3,
    widths: tuple[int, ...] = WIDTHS,
    text_width: int = TEXT_WIDTH,
    text_layers: int = 3,
    **bounds: Any,
) -> None:
    """Trains UNet and text encoder and writes the model folder, half-way and at the end.

    It begins from the weights in `out`, where there are some. `versions`: drawings of each pair that are encoded at a time.
    """
    device = data.device
    tokenizer, vae = _tokenizer(data, out / "tokenizer"), load_vae(out, device)
    unet = new_unet(widths, text_width, SIZE // 8, HEADS).to(device, memory_format=torch.channels_last)
    text: CLIPTextModel = new_text_encoder(tokenizer, text_width, text_layers).to(device)
    _begin(unet, out / "unet" / "diffusion_pytorch_model.safetensors", log)
    _begin(text, out / "text_encoder" / "model.safetensors", log)
    rates = Rates(lr, warmup=200, fall=0.6, average=0.9993)
    run = Run(nn.ModuleDict({"unet": unet, "text": text}), rates, out / "checkpoints" / "unet.pt", **bounds)
    drawn_by = random.Random(f"drawings {time.time_ns()}")
    pool = encode_pool(vae, data, versions, tokenizer, drawn_by)
    log(latents=len(pool[0]), latent_deviation=round(float(pool[0].std()), 3), step=run.step)
    batches = _Batches(tokenize(tokenizer, [""]), batch, device)
    denoise = _recorded(unet, device, batch, (pool[1].shape[1], text_width), log)
    running = torch.zeros((), device=device)
    logged, renewed, half = set[float](), {m for m in _POOL_MARKS if run.progress >= m}, {0.5} if run.progress >= 0.5 else set()
    for progress in run.steps():
        noisy, timesteps, ids, wanted = batches(*pool)
        with autocast(device):
            states = text(ids).last_hidden_state
        loss = functional.mse_loss(denoise(noisy, timesteps, states.float()), wanted)
        run.update(loss)
        running.lerp_(loss.detach(), 0.02 if run.step > 50 else 0.5)
        if due(progress, _LOG_MARKS, logged):
            log(step=run.step, samples=(run.step + 1) * batch, loss=round(float(running), 4))
        if due(progress, (0.5,), half):
            _export(run, unet, text, tokenizer, vae, data, out, "half", log)
        if due(progress, _POOL_MARKS, renewed):
            pool = encode_pool(vae, data, versions, tokenizer, drawn_by)
    _export(run, unet, text, tokenizer, vae, data, out, "end", log)


def _export(
    run: Run,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    data: Textures,
    out: Path,
    name: str,
    log: Log,
) -> None:
    """Writes the model folder with the averaged weights, and sample grids."""
    with run.averaged():
        unet.eval()
        text.eval()
        save_part(unet, out / "unet")
        save_part(text, out / "text_encoder")
        scheduler().save_pretrained(out / "scheduler")
        save_pairs(data.train, data.held, out)
        (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
        prompts = sample_grids(unet, text, tokenizer, vae, data, out / "training", name)
        unet.train()
        text.train()
    log(exported=name, step=run.step, first_prompts=prompts)
