"""The tokenizer of a bundle: from the files that its manifest lists and nothing else, and tried before anything is encoded."""

import json
from pathlib import Path
from typing import Any

from engines import Bundle
from engines.bundle.damage import damaged
from engines.support.tokenizers import check_tokenizer, load_clip_tokenizer

__all__ = ["load_tokenizer"]

_MOST_STEPS = 100_000


def load_tokenizer(bundle: Bundle) -> Any:
    """CLIP's tokenizer, as transformers has it.

    Raises:
        BundleError: its files are missing or damaged, or its numbers are none that the text encoder takes.
    """
    listed = [file.path for file in bundle.manifest.files]
    if "scheduler/scheduler_config.json" not in listed or not any(path.startswith("tokenizer/") for path in listed):
        raise damaged(bundle.folder, "its manifest lists no tokenizer or no scheduler")
    with bundle.settings() as folder:
        _check_scheduler(bundle, folder)
        try:
            tokenizer = load_clip_tokenizer(folder / "tokenizer")
            # What is cut is said in our own words: see runtime.text.encoding.
            tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
            check_tokenizer(tokenizer, bundle.manifest.text_length, bundle.manifest.vocabulary)
        except Exception as error:  # libraries raise what they like
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise damaged(bundle.folder, f"its folder tokenizer holds no tokenizer for it ({reason})") from error
    return tokenizer


def _check_scheduler(bundle: Bundle, folder: Path) -> None:
    """Raise BundleError unless the scheduler's configuration is one, whatever it says."""
    try:
        config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(bundle.folder, f"scheduler/scheduler_config.json is no JSON ({error})") from error
    steps = config.get("num_train_timesteps", 1000) if isinstance(config, dict) else None
    if type(steps) is not int or not 1 <= steps <= _MOST_STEPS:
        what = f"scheduler/scheduler_config.json has num_train_timesteps = {str(steps)[:40]}, expected 1 to {_MOST_STEPS}"
        raise damaged(bundle.folder, what)
