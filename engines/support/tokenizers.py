"""CLIP's tokenizer from a folder's own files: a configuration may name other files, which transformers would open."""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["length_in", "load_clip_tokenizer"]

_CONFIG = "tokenizer_config.json"
_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_SETTINGS = frozenset({
    "bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "additional_special_tokens",
    "extra_special_tokens", "added_tokens_decoder", "model_max_length", "padding_side", "truncation_side", "add_prefix_space",
    "split_special_tokens", "clean_up_tokenization_spaces", "do_lower_case", "errors", "tokenizer_class", "backend",
})  # fmt: skip
"""The entries that a configuration may have. Others (``gguf_file``, ``vocab_file``, ``init_inputs``) lead to files anywhere."""


def length_in(folder: Path) -> int | None:
    """The tokens of a prompt that the configuration in a tokenizer's folder says; None where it says none, or no number."""
    length = _config(folder).get("model_max_length")
    return length if type(length) is int and length > 0 else None


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / _CONFIG).read_text("utf-8")) if (folder / _CONFIG).is_file() else {}
    return dict(config)


def load_clip_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer, as transformers has it, from the files of it that are known by name.

    Raises:
        Exception: whatever transformers raises for files that are missing or damaged.
    """
    from transformers import CLIPTokenizer

    with TemporaryDirectory(prefix="unet-heirloom-") as temporary:
        for name in _FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(temporary) / name)
        kept = {name: value for name, value in _config(folder).items() if name in _SETTINGS}
        if length_in(folder) is None:
            kept.pop("model_max_length", None)
        (Path(temporary) / _CONFIG).write_text(json.dumps(kept), "utf-8")
        return CLIPTokenizer.from_pretrained(temporary, local_files_only=True)
