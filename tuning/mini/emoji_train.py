"""`python -m tuning.mini.emoji_train`: the embedded model and its reader from the emoji, stage by stage, each for so many seconds.

Written for one GPU and some minutes; the same commands run on a CPU for longer. Stages: `vae` (autoencoder, then whitened),
`unet` (UNet and text encoder, jointly, on encoded drawings), `reader` (may run beside the others). A stage that was stopped starts
from the weights that it exported last.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from tuning.mini.emoji import STYLES, Drawing, Icon, caption, load_icons, split
from tuning.mini.emoji_pictures import SIZE, draw, random_drawing, render
from tuning.mini.emoji_reader import Reader, share_right
from tuning.mini.models import new_text_encoder, new_unet, new_vae, scheduler, train_tokenizer_on

VAE_WIDTHS = (24, 48, 96, 96)
UNET_WIDTHS = (32, 64, 96, 96)
HEADS = 2
GUIDANCE = 3.0


class Log:
    """Lines on the console and in a file, with the seconds since the start."""

    def __init__(self, path: Path, stage: str) -> None:
        self._path, self._stage, self._start = path, stage, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, **figures: Any) -> None:
        row = {"stage": self._stage, "seconds": round(time.monotonic() - self._start, 1)} | figures
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU."""
    if device.type != "cuda":
        return nullcontext()
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


class Average:
    """An exponential moving average of parameters, updated in place."""

    def __init__(self, parameters: Sequence[Tensor], decay: float = 0.999) -> None:
        self._of, self._decay, self._step = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self._of]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are."""
        self._step += 1
        decay = min(self._decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._of], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the parameters."""
        for parameter, value in zip(self._of, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


class Clock:
    """How much of a stage's seconds, or steps, are used up; learning rates follow it."""

    def __init__(self, seconds: float, steps: int | None) -> None:
        self._start, self._seconds, self._steps, self.step = time.monotonic(), seconds, steps, 0

    @property
    def progress(self) -> float:
        """0 to 1."""
        return self.step / self._steps if self._steps else (time.monotonic() - self._start) / self._seconds

    def run(self) -> Iterator[float]:
        """The progress before each step, until the end."""
        while (progress := self.progress) < 1:
            yield progress
            self.step += 1

    def factor(self, progress: float, *, warmup: int = 100, decay: float = 0.5) -> float:
        """The learning rate's: a warm-up, a plateau, then down to nothing along a cosine-like square."""
        return min(1.0, (self.step + 1) / warmup) * min(1.0, max(1e-3, (1 - progress) / decay)) ** 1.5


def optimizer_of(parameters: Sequence[nn.Parameter], lr: float, device: torch.device, decay: float = 0.01) -> torch.optim.AdamW:
    """AdamW, in one kernel where that is to be had."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=device.type == "cuda")


def update(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], lr: float, clip: float = 1.0) -> None:
    """One step at a learning rate, with gradients clipped."""
    torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Data:
    """The icons of training and those held back, with their textures on a device."""

    def __init__(self, folder: Path, device: torch.device, limit: int | None = None) -> None:
        icons = load_icons(folder)
        if limit:  # for trials: the first concepts
            concepts = sorted({icon.concept for icon in icons})[:limit]
            icons = [icon for icon in icons if icon.concept in concepts]
        self.train, self.held = split(icons)
        self.concepts = sorted({icon.concept for icon in icons})
        textures = render(self.train + self.held, os.cpu_count() or 1)
        self.textures = textures.to(device)
        self.device = device

    def pictures(self, rows: Sequence[int], rng: random.Random) -> tuple[Tensor, list[Drawing]]:
        """Pictures (n, 3, SIZE, SIZE) of training icons, each drawn in some way."""
        drawings = [random_drawing(self.train[row], rng) for row in rows]
        return draw(self.textures[torch.tensor(rows, device=self.device)], drawings, rng), drawings

    def plain(self, icons: Sequence[Icon], start: int) -> Tensor:
        """Pictures of icons as they are, on white; ``start`` is the row of the first."""
        drawings = [Drawing(icon.concept, icon.style) for icon in icons]
        return draw(self.textures[start : start + len(icons)], drawings)


def grid(pictures: Tensor, columns: int, path: Path) -> None:
    """Write pictures (n, 3, h, w) in [-1, 1] as one PNG."""
    from PIL import Image

    n = len(pictures) // columns * columns
    tiles = pictures[:n].clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()
    tiles = tiles.view(n // columns, columns, 3, *tiles.shape[2:]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(tiles.numpy()).save(path)


def save_half(module: nn.Module, path: Path) -> None:
    """Write a module's state in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: (v.half() if v.is_floating_point() else v).contiguous().cpu() for k, v in module.state_dict().items()}
    save_file(state, path)


def save_part(module: Any, folder: Path) -> None:
    """Write a model's folder in half precision, whole or not at all for each file."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "model.safetensors" if folder.name == "text_encoder" else "diffusion_pytorch_model.safetensors"
    save_half(module, folder / f"{name}.new")
    (folder / f"{name}.new").replace(folder / name)
    if hasattr(module, "save_config"):
        module.save_config(folder)
    else:
        module.config.save_pretrained(folder)


# The autoencoder


def train_vae(data: Data, out: Path, seconds: float, steps: int | None, batch: int, log: Log) -> None:
    """Absolute error, that of the picture's gradients, and a little KL; crops first, whole pictures in the last half."""
    from tuning.mini.autoencoder import whiten

    vae: Any = new_vae(VAE_WIDTHS, SIZE).to(data.device, memory_format=torch.channels_last)
    parameters = list(vae.parameters())
    optimizer, average = optimizer_of(parameters, 2e-3, data.device, 0.0), Average(parameters, 0.998)
    clock, rng = Clock(seconds, steps), random.Random("vae")
    shown = 0.0
    for progress in clock.run():
        crops = progress < 0.5
        x, _ = data.pictures([rng.randrange(len(data.train)) for _ in range(batch)], rng)
        if crops:
            top, left = rng.randrange(SIZE // 2 + 1), rng.randrange(SIZE // 2 + 1)
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
        x = x.contiguous(memory_format=torch.channels_last)
        with autocast(data.device):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample()).sample
        error = (y - x).float()
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes
        loss = loss + 1e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()
        loss.backward()
        update(optimizer, parameters, 2e-3 * clock.factor(progress, decay=0.7))
        average.update()
        if progress - shown > 0.1 or clock.step == 10:
            shown = progress
            log(step=clock.step, pictures=(clock.step + 1) * batch, loss=round(loss.item(), 4))
    average.swap()
    vae.eval()
    whiten(vae, torch.cat([data.pictures([rng.randrange(len(data.train)) for _ in range(256)], rng)[0] for _ in range(8)]))
    log(step=clock.step, held_back_psnr=_psnr(vae, data, out))
    save_part(vae, out / "vae")


def train_decoder(data: Data, out: Path, seconds: float, steps: int | None, batch: int, log: Log) -> None:
    """The decoder alone goes on learning from latents of the frozen encoder, with a little noise; exported now and then."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(data.device)
    vae = vae.to(memory_format=torch.channels_last)
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer, average = optimizer_of(parameters, 1e-3, data.device, 0.0), Average(parameters, 0.998)
    clock, shown = Clock(seconds, steps), 0.0
    rng = random.Random(f"decoder {time.time_ns()}")
    for progress in clock.run():
        x, _ = data.pictures([rng.randrange(len(data.train)) for _ in range(batch)], rng)
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(data.device):
            latents = vae.encode(x).latent_dist.mode()
        latents = latents + 0.06 * torch.randn_like(latents)
        if progress < 0.5:  # a quarter of each picture: more of them in the same time
            top, left = (8 * rng.randrange(SIZE // 16 + 1) for _ in range(2))
            x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
            latents = latents[:, :, top // 8 : top // 8 + SIZE // 16, left // 8 : left // 8 + SIZE // 16]
        with autocast(data.device):
            y = vae.decode(latents).sample
        error = (y - x).float()
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        loss = error.abs().mean() + 2 * error.square().mean() + 0.5 * slopes
        loss.backward()
        update(optimizer, parameters, 1e-3 * clock.factor(progress, decay=0.9))
        average.update()
        if progress - shown > 0.1:
            shown = progress
            average.swap()
            log(step=clock.step, loss=round(loss.item(), 4), held_back_psnr=_psnr(vae, data, out))
            save_part(vae, out / "vae")
            average.swap()
    average.swap()
    log(step=clock.step, held_back_psnr=_psnr(vae, data, out))
    save_part(vae, out / "vae")


@torch.no_grad()
def _psnr(vae: Any, data: Data, out: Path) -> float:
    """Of held-back pictures encoded and decoded, in dB; the first are drawn into a file."""
    valid = data.plain(data.held, len(data.train))[:128]
    again = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in valid.split(64)]).clamp(-1, 1)
    grid(torch.cat([valid[:16], again[:16]]), 16, out / "vae.png")
    return round(float((-10 * torch.log10((again - valid).square().mean((1, 2, 3)) / 4)).mean()), 2)


# UNet and text encoder


def encode_pool(vae: Any, data: Data, versions: int, tokenizer: Any, seed: str) -> tuple[Tensor, Tensor]:
    """Latents (n, 4, 16, 16) and token ids (n, length) of every training icon drawn in several ways."""
    rng, latents, texts = random.Random(seed), [], []
    rows = [row for _ in range(versions) for row in range(len(data.train))]
    with torch.no_grad():
        for at in range(0, len(rows), 512):
            pictures, drawings = data.pictures(rows[at : at + 512], rng)
            with autocast(data.device):
                mode = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
            latents.append(mode.float())
            texts += [caption(drawing, rng) for drawing in drawings]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat(latents), tokens.to(data.device)


class _Denoiser(nn.Module):
    """The UNet in mixed precision, as a function of tensors: what is recorded as a CUDA graph."""

    def __init__(self, unet: Any, device: torch.device) -> None:
        super().__init__()
        self.unet, self._device = unet, device

    def forward(self, noisy: Tensor, timesteps: Tensor, states: Tensor) -> Tensor:
        with autocast(self._device):
            result: Tensor = self.unet(noisy, timesteps, states, return_dict=False)[0]
        return result.float()


def recorded(unet: Any, device: torch.device, batch: int, text: tuple[int, int], log: Log) -> Callable[..., Tensor]:
    """The UNet's forward and backward passes as CUDA graphs, or as they are where that fails."""
    module = _Denoiser(unet, device)
    if device.type != "cuda":
        return module
    try:
        sample = (
            torch.randn(batch, 4, SIZE // 8, SIZE // 8, device=device).contiguous(memory_format=torch.channels_last),
            torch.randint(0, 1000, (batch,), device=device),
            torch.randn(batch, *text, device=device, requires_grad=True),
        )
        made: Callable[..., Tensor] = torch.cuda.make_graphed_callables(module, sample, allow_unused_input=True)
        return made
    except Exception as error:
        log(no_graph=f"{type(error).__name__}: {error}"[:300])
        return module


def train_unet(
    data: Data, out: Path, seconds: float, steps: int | None, batch: int, versions: int, log: Log, lr: float = 2e-3
) -> None:
    """Velocity prediction: the squared error, every timestep with the same weight; captions dropped one time in ten."""
    from diffusers import AutoencoderKL

    tokenizer = train_tokenizer_on(_captions(data), out / "tokenizer", 1400)
    vae = AutoencoderKL.from_pretrained(out / "vae", torch_dtype=torch.float32).to(data.device).eval()
    run = str(time.time_ns())
    latents, tokens = encode_pool(vae, data, versions, tokenizer, f"{run} 0")
    log(latents=len(latents), latent_std=round(float(latents.std()), 3))
    unet: Any = new_unet(UNET_WIDTHS, 128, SIZE // 8, HEADS).to(data.device, memory_format=torch.channels_last)
    text: Any = new_text_encoder(tokenizer).to(data.device)
    for part, module, name in (("unet", unet, "diffusion_pytorch_model"), ("text_encoder", text, "model")):
        path = out / part / f"{name}.safetensors"
        if path.exists():  # resumed
            module.load_state_dict({k: v.float() for k, v in load_file(path).items()}, strict=False)
            log(resumed=part)
    parameters = [*unet.parameters(), *text.parameters()]
    optimizer, average = optimizer_of(parameters, lr, data.device), Average(parameters, 0.9993)
    noise_schedule = scheduler()
    alphas = noise_schedule.alphas_cumprod.to(data.device)
    empty = tokenizer([""], padding="max_length", return_tensors="pt").input_ids.to(data.device)
    denoise = recorded(unet, data.device, batch, (tokens.shape[1], 128), log)
    clock, device, running = Clock(seconds, steps), data.device, torch.zeros((), device=data.device)
    shown, exported, drawn = 0.0, False, 0
    strata = torch.arange(batch, device=device)
    for progress in clock.run():
        rows = torch.randint(0, len(latents), (batch,), device=device)
        clean, ids = latents[rows], tokens[rows]
        ids = torch.where(torch.rand(batch, 1, device=device) < 0.1, empty, ids)
        timesteps = ((strata + torch.rand(batch, device=device)) / batch * 1000).long().clamp_(max=999)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        with autocast(device):
            states = text(ids).last_hidden_state
        loss = functional.mse_loss(denoise(noisy, timesteps, states.float()), target)
        loss.backward()
        update(optimizer, parameters, lr * clock.factor(progress, warmup=200, decay=0.6))
        average.update()
        running.lerp_(loss.detach(), 0.02 if clock.step > 50 else 0.5)
        if progress - shown > 0.04 or clock.step in (10, 50):
            shown = progress
            log(step=clock.step, samples=(clock.step + 1) * batch, loss=round(float(running), 4))
        if not exported and progress > 0.5:
            exported = True
            average.swap()
            _export(unet, text, tokenizer, vae, data, out, "half", log)
            average.swap()
        if progress > (drawn + 1) / 4:  # other drawings of the same icons, so that none is learnt by heart
            drawn += 1
            latents, tokens = encode_pool(vae, data, versions, tokenizer, f"{run} {drawn}")
    average.swap()
    _export(unet, text, tokenizer, vae, data, out, "end", log)


def _captions(data: Data) -> list[str]:
    rng = random.Random("tokenizer")
    return [caption(random_drawing(icon, rng), rng) for icon in data.train for _ in range(2)]


def _export(unet: Any, text: Any, tokenizer: Any, vae: Any, data: Data, out: Path, name: str, log: Log) -> None:
    unet.eval()
    text.eval()
    save_part(unet, out / "unet")
    save_part(text, out / "text_encoder")
    scheduler().save_pretrained(out / "scheduler")
    (out / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    seen, held = data.train[:: max(1, len(data.train) // 48)][:48], data.held[:48]
    prompts = [f"{icon.concept}, {icon.style} style" for icon in (*seen, *held)]
    made = sample(unet, text, tokenizer, vae, prompts, data.device)
    grid(made[: len(seen)], 12, out / f"seen-{name}.png")
    grid(made[len(seen) :], 12, out / f"held-{name}.png")
    log(exported=name, prompts=[*prompts[:4], *prompts[48:52]])
    unet.train()
    text.train()


INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@torch.no_grad()
def sample(
    unet: Any, text: Any, tokenizer: Any, vae: Any, prompts: Sequence[str], device: torch.device, steps: int = 25
) -> Tensor:
    """Pictures (n, 3, SIZE, SIZE) of prompts: DDIM with guidance, in float32."""
    ids = tokenizer([*prompts, *[""] * len(prompts)], padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = text(ids.to(device)).last_hidden_state
    x = torch.randn(len(prompts), 4, SIZE // 8, SIZE // 8, generator=torch.Generator().manual_seed(0)).to(device)
    ddim = scheduler()
    ddim.set_timesteps(steps)
    for timestep in ddim.timesteps:
        both = unet(torch.cat([x, x]), timestep.to(device), states, return_dict=False)[0]
        wanted, plain = both.chunk(2)
        x = ddim.step(plain + GUIDANCE * (wanted - plain), timestep, x).prev_sample
    return torch.cat([vae.decode(part).sample for part in x.split(32)]).clamp(-1, 1)


# The reader


def train_reader(data: Data, out: Path, seconds: float, steps: int | None, batch: int, log: Log) -> None:
    """Cross entropy of concept and style, on training pairs drawn in many ways; validated on real pairs held back."""
    numbers = {concept: number for number, concept in enumerate(data.concepts)}
    concept = torch.tensor([numbers[icon.concept] for icon in data.train], device=data.device)
    style = torch.tensor([STYLES.index(icon.style) for icon in data.train], device=data.device)
    reader = Reader(len(data.concepts), len(STYLES)).to(data.device, memory_format=torch.channels_last)
    parameters = list(reader.parameters())
    optimizer, average = optimizer_of(parameters, 3e-3, data.device, 0.05), Average(parameters, 0.998)
    clock, rng, shown = Clock(seconds, steps), random.Random("reader"), 0.0
    for progress in clock.run():
        rows = [rng.randrange(len(data.train)) for _ in range(batch)]
        x, _ = data.pictures(rows, rng)
        x = x + 0.1 * torch.rand(batch, 1, 1, 1, device=data.device) * torch.randn_like(x)
        if rng.random() < 0.3:  # as an autoencoder blurs
            x = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        if rng.random() < 0.5:
            x = x.flip(-1)
        at = torch.tensor(rows, device=data.device)
        with autocast(data.device):
            concepts, styles = reader(x.contiguous(memory_format=torch.channels_last))
        loss = functional.cross_entropy(concepts.float(), concept[at], label_smoothing=0.1)
        loss = loss + 0.3 * functional.cross_entropy(styles.float(), style[at])
        loss.backward()
        update(optimizer, parameters, 3e-3 * clock.factor(progress, decay=0.8))
        average.update()
        if progress - shown > 0.1 or clock.step == 10:
            shown = progress
            log(step=clock.step, loss=round(loss.item(), 4))
    average.swap()
    _settle(reader, data)
    reader.eval()
    held = data.plain(data.held, len(data.train))
    with torch.no_grad():
        scores = reader(held)
    wanted = torch.tensor([numbers[icon.concept] for icon in data.held], device=data.device)
    styles_wanted = torch.tensor([STYLES.index(icon.style) for icon in data.held], device=data.device)
    figures = {f"concept_top{k}": round(share_right(scores[0], wanted, k), 4) for k in (1, 5)}
    log(step=clock.step, held_back=figures | {"style": round(share_right(scores[1], styles_wanted), 4)})
    save_half(reader, out / "reader" / "reader.safetensors")
    (out / "reader" / "classes.json").write_text(json.dumps({"concepts": data.concepts, "styles": STYLES}) + "\n")


@torch.no_grad()
def _settle(reader: Reader, data: Data) -> None:
    """Running means of the averaged weights' own activations."""
    rng = random.Random("settle")
    reader.train()
    for _ in range(60):
        reader(data.pictures([rng.randrange(len(data.train)) for _ in range(128)], rng)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tuning.mini.emoji_train", description=__doc__)
    parser.add_argument("stages", nargs="+", choices=("vae", "decoder", "unet", "reader"))
    parser.add_argument("--icons", type=Path, required=True, help="folder of `fetch`")
    parser.add_argument("--out", type=Path, default=Path("runs/emoji"))
    parser.add_argument("--seconds", default="60", help="of each stage, separated by commas")
    parser.add_argument("--steps", type=int, help="of each stage, instead of seconds")
    parser.add_argument("--batch", default="128", help="of each stage, separated by commas")
    parser.add_argument("--versions", type=int, default=16, help="drawings of each icon that are encoded at a time")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the UNet")
    parser.add_argument("--concepts", type=int, help="only so many, for trials")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    options.out.mkdir(parents=True, exist_ok=True)
    data = Data(options.icons, device, options.concepts)
    seconds, batches = ([float(v) for v in text.split(",")] for text in (options.seconds, options.batch))
    for number, stage in enumerate(options.stages):
        log = Log(options.out / f"{stage}.jsonl", stage)
        log(device=str(device), icons=len(data.train), held_back=len(data.held), concepts=len(data.concepts))
        bound, batch = seconds[number % len(seconds)], int(batches[number % len(batches)])
        if stage == "vae":
            train_vae(data, options.out, bound, options.steps, batch, log)
        elif stage == "decoder":
            train_decoder(data, options.out, bound, options.steps, batch, log)
        elif stage == "unet":
            train_unet(data, options.out, bound, options.steps, batch, options.versions, log, options.lr)
        else:
            train_reader(data, options.out, bound, options.steps, batch, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
