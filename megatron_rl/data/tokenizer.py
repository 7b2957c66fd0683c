"""The tokenizer, and the special tokens that the rest of the house asks of it.

The tokenizer is used as its directory describes it; nothing here changes it. It needs an end-of-sequence token. It
needs no padding token: training is packed, and where generation pads on the left the filling is masked.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or a hub id. Python code that comes with a model is never run."""
    if _read_object(Path(path) / "tokenizer_config.json").get("auto_map"):
        raise ValueError(
            f"cannot load a tokenizer from {str(path)!r}: it comes with Python code of its own (auto_map in "
            "tokenizer_config.json), which is never run; use one of a class that transformers has"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers passes on whatever a wrong value in a file made happen
        raise ValueError(
            f"cannot load a tokenizer from {str(path)!r}: {type(error).__name__}: {error}\nName a directory with "
            "tokenizer.json and tokenizer_config.json, or a hub id."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {str(path)!r} has no end-of-sequence token, so a response could never end: "
            'set "eos_token" in its tokenizer_config.json'
        )
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills a left-padded batch: the padding token, else the end-of-sequence token. It is masked."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_ids(tokenizer: PreTrainedTokenizerBase, generation_config_eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """Every id that ends a response: the tokenizer's, and those of the model's generation config."""
    if generation_config_eos is None:
        generation_config_eos = ()
    elif isinstance(generation_config_eos, int):
        generation_config_eos = (generation_config_eos,)
    return tuple(sorted({tokenizer.eos_token_id, *generation_config_eos}))


def read_generation_eos(model_dir: str | Path) -> int | list[int] | None:
    """`eos_token_id` of the directory's generation_config.json; None if there is no such file or it names none."""
    path = Path(model_dir) / "generation_config.json"
    ids = _read_object(path).get("eos_token_id")
    if not all(type(id_) is int for id_ in (ids if isinstance(ids, list) else [] if ids is None else [ids])):
        raise ValueError(f"{path} has eos_token_id={ids!r}: make it a token id, or a list of them")
    return ids


def _read_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
