"""`mini`'s networks: the classes of Stable Diffusion 1.5, only narrower; and their tokenizer.

Four attention heads in place of Stable Diffusion's eight: narrow ones cost a CPU more than they are worth. Mind that
diffusers reads `attention_head_dim` of this UNet class as the number of heads (huggingface/diffusers issue 2011).
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.support.tokenizers import WORDS
from tuning.mini.scenes import caption, sample_scene

__all__ = [
    "INDEX",
    "TEXT_LENGTH",
    "load_tokenizer",
    "new_text_encoder",
    "new_unet",
    "new_vae",
    "save_shell",
    "scheduler",
    "train_tokenizer",
    "train_tokenizer_on",
]

TEXT_LENGTH = 32
VOCABULARY = 650
_SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

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


def new_vae(widths: tuple[int, ...] = (16, 32, 64, 64), size: int = 64) -> AutoencoderKL:
    """A VAE with random weights: RGB in [-1, 1] -> 4 latent channels at an eighth of the size (for four widths)."""
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=size,
    )


def new_unet(
    widths: tuple[int, ...] = (32, 64, 96, 96), text_width: int = 128, size: int = 8, heads: int = 4
) -> UNet2DConditionModel:
    """A UNet with random weights, in SD 1.5's shape: attention everywhere but in the innermost stage."""
    inner = len(widths) - 1
    return UNet2DConditionModel(
        sample_size=size,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * inner + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * inner,
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=heads,
        norm_num_groups=8,
    )


def new_text_encoder(tokenizer: CLIPTokenizer, width: int = 128, layers: int = 3) -> CLIPTextModel:
    """A CLIP text encoder with random weights for this tokenizer's vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def scheduler(**changes: Any) -> DDIMScheduler:
    """The noise schedule of SD 1.5 with v-prediction (Salimans and Ho, arXiv 2202.00512)."""
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    return DDIMScheduler(**(settings | changes))


def train_tokenizer(folder: Path, captions: int = 4000) -> CLIPTokenizer:
    """A tokenizer for captions of scenes; see ``train_tokenizer_on``."""
    rng = random.Random("tokenizer")
    return train_tokenizer_on([caption(sample_scene(rng), rng) for _ in range(captions)], folder)


def train_tokenizer_on(texts: Sequence[str], folder: Path, vocabulary_size: int = VOCABULARY) -> CLIPTokenizer:
    """Learns a byte-level BPE of about so many tokens from captions, writes it in CLIP's format, and loads it."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 256, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{a}</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    words = sorted({word for text in texts for word in re.findall(r"[^\W\d_]{2,}", text.lower())})
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_LENGTH, **{WORDS: words})
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return load_tokenizer(folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Loads a tokenizer folder."""
    return CLIPTokenizer.from_pretrained(folder)


def save_shell(folder: Path) -> None:
    """Writes what of a model folder has no weights: the pipeline's index, the tokenizer and the scheduler's configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(INDEX, indent=2) + "\n")
    scheduler().save_pretrained(folder / "scheduler")
    train_tokenizer(folder / "tokenizer")
