"""CLIP's tokenizer from a folder's own files: a configuration may name other files, which transformers would open."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

__all__ = ["LEAST_LENGTH", "WORDS", "check_tokenizer", "learned_words", "length_in", "load_clip_tokenizer"]

LEAST_LENGTH = 3
"""Tokens that a text encoder reads at a time: both marks, and one word."""
WORDS = "words"
"""The entry of a tokenizer's configuration that lists, in lower case, the words of the captions that a model was trained with."""
_CONFIG = "tokenizer_config.json"
_TRIALS = ("", "a red star", "\u661f " * 100)
_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
_SETTINGS = frozenset({
    "bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token", "additional_special_tokens",
    "extra_special_tokens", "added_tokens_decoder", "model_max_length", "padding_side", "truncation_side", "add_prefix_space",
    "split_special_tokens", "clean_up_tokenization_spaces", "do_lower_case", "errors", "tokenizer_class", "backend",
    WORDS,
})  # fmt: skip
"""The entries that a configuration may have. Others (``gguf_file``, ``vocab_file``, ``init_inputs``) lead to files anywhere."""


def length_in(folder: Path) -> int | None:
    """The tokens of a prompt that the configuration in a tokenizer's folder says; None where it says none, or no number."""
    length = _config(folder).get("model_max_length")
    return length if type(length) is int and length > 0 else None


def learned_words(tokenizer: Any) -> frozenset[str]:
    """The words that a model of few words was trained with; none where a tokenizer does not say: it may know all there are."""
    words = tokenizer.init_kwargs.get(WORDS)
    return frozenset(word for word in words if isinstance(word, str)) if isinstance(words, list | tuple) else frozenset()


def _config(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / _CONFIG).read_text("utf-8")) if (folder / _CONFIG).is_file() else {}
    return dict(config)


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Raise ValueError for a panic of the compiled library, which is no Exception."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(str(error) or type(error).__name__) from error


@_panics_are_errors()
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


@_panics_are_errors()
def check_tokenizer(tokenizer: Any, length: int, vocabulary: int) -> None:
    """Check that prompts become as many numbers as a text encoder reads, of those that it knows.

    Raises:
        ValueError: they do not; or whatever else the tokenizer raises for a prompt.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if not 0 <= largest < vocabulary:
        raise ValueError(f"its numbers go up to {largest}, and the text encoder knows {vocabulary}")
    if length < LEAST_LENGTH:
        raise ValueError(f"prompts become {length} tokens, expected at least {LEAST_LENGTH}: two marks and a word")
    for prompt in _TRIALS:
        if (marks := len(tokenizer(prompt, verbose=False).input_ids)) < 2:
            raise ValueError(f"a prompt becomes {marks} numbers, expected a mark at both ends")
        numbers = tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids
        if len(numbers) != length or not all(0 <= number < vocabulary for number in numbers):
            raise ValueError(f"a prompt becomes {len(numbers)} numbers, expected {length} from 0 to {vocabulary - 1}")
