"""`conversion.json`: what a converted model was made of, and by which versions."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

FILE = "conversion.json"
LIBRARIES = ("megatron_rl", "megatron-core", "torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    return {name: version(name) for name in LIBRARIES}


def write(directory: Path, **said: Any) -> None:
    (directory / FILE).write_text(json.dumps({"versions": versions(), **said}, indent=1) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return held


def digest(tensors: Mapping[str, str]) -> str:
    """One hash of all tensors, from the name and the hash of each."""
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()
