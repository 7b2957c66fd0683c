"""`convert inspect`: what is in a Hugging Face directory or a checkpoint, from headers alone."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.store import find_checkpoint, read_state
from megatron_rl.checkpoint.torch_dist import SavedTensors, Spec
from megatron_rl.convert import provenance
from megatron_rl.convert.opening import is_hf
from megatron_rl.convert.tensors import HfTensors
from megatron_rl.models.hf_config import load_config


def inspect(path: Path) -> dict[str, Any]:
    """What there is, as JSON."""
    return _directory(path) if is_hf(path) else _checkpoint(find_checkpoint(path, "the checkpoint"))


def _directory(path: Path) -> dict[str, Any]:
    hf, tensors = load_config(path), HfTensors(path)
    return {
        "kind": "Hugging Face directory",
        "path": str(path),
        "model": {
            "model_type": hf.model_type,
            "architectures": hf.architectures,
            "tie_word_embeddings": hf.tie_word_embeddings,
            "vocab_size": hf.vocab_size,
        },
        "files": {file: held.st_size for file, held in tensors.files().items()},
        "parts": {"tensors": _sum(tensors.specs)},
        "tensors": _list(tensors.specs),
        "conversion": _conversion(path),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    state, saved = read_state(path), SavedTensors(path)
    parts: dict[str, dict[str, Spec]] = {}
    for key, spec in saved.specs.items():
        role, _, rest = key.partition(".")
        part = f"{role} optimizer" if rest.startswith("optimizer.") else role
        parts.setdefault(part, {})[key] = spec
    return {
        "kind": "checkpoint",
        "path": str(path),
        "step": state["step"],
        "trainer": state.get("trainer"),
        "models": state["models"],
        "layout": state.get("layout") or (_conversion(path) or {}).get("layout"),
        "files": {file: (path / file).stat().st_size for file in saved.files(list(saved.specs))},
        "parts": {name: _sum(specs) for name, specs in sorted(parts.items())},
        "tensors": _list(saved.specs),
        "conversion": _conversion(path),
    }


def as_text(held: Mapping[str, Any], *, tensors: bool) -> str:
    """The same for people; every tensor only if asked for."""
    lines = [f"{held['kind']} {held['path']}"]
    if "step" in held:
        lines.append(f"step {held['step']}" + (f" of a {held['trainer']} run" if held["trainer"] else ""))
        for role, identity in held["models"].items():
            lines.append(f"{role}: " + ", ".join(f"{name}={value}" for name, value in identity.items()))
        lines.append(f"written under {held['layout']}")
    else:
        lines.append(", ".join(f"{name}={value}" for name, value in held["model"].items()))
    for part, found in held["parts"].items():
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in found["dtypes"].items())
        lines.append(f"{part}: {found['count']} ({dtypes}), {found['parameters']:,} numbers, {found['bytes']:,} bytes")
    lines.append(f"{len(held['files'])} files, {sum(held['files'].values()):,} bytes")
    if held["conversion"]:
        made = held["conversion"]
        versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        lines.append(f"made by convert {made['verb']} of {made['source']} with {versions}")
    if tensors:
        lines += [f"{name} {row['dtype']} {row['shape']}" for name, row in held["tensors"].items()]
    return "\n".join(lines)


def _sum(specs: Mapping[str, Spec]) -> dict[str, Any]:
    return {
        "count": len(specs),
        "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "dtypes": dict(collections.Counter(_name(spec) for spec in specs.values())),
    }


def _list(specs: Mapping[str, Spec]) -> dict[str, Any]:
    return {name: {"dtype": _name(spec), "shape": list(spec.shape)} for name, spec in sorted(specs.items())}


def _name(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _conversion(path: Path) -> dict[str, Any] | None:
    """Without the hashes of single tensors and files."""
    held = provenance.read(path)
    return held and {name: value for name, value in held.items() if name not in ("tensors", "files")}
