"""`megatron-rl convert VERB ...`: from arguments to the verb, and what it says."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_rl.convert import comparing, inspecting, planning
from megatron_rl.convert.exporting import export_model, read_saved
from megatron_rl.convert.importing import import_model, read_source
from megatron_rl.convert.memory import size
from megatron_rl.convert.opening import as_hf, is_hf, to_compare
from megatron_rl.convert.resharding import reshard
from megatron_rl.convert.table import Layout
from megatron_rl.metrics.bar import counting
from megatron_rl.models.hf_config import load_shape

ROLES_OF_IMPORT = ("actor", "critic")


def convert(options: argparse.Namespace) -> int:
    """Runs one verb; the exit code: 0, or 1 where two models are not the same. ValueError for a mistake."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("convert is one process, and this is one of several: start it without torchrun")
    return _VERBS[options.convert](options)


def _plan(options: argparse.Namespace) -> int:
    dtype, memory = _dtype(options), size(options.max_memory)
    if is_hf(options.source):
        source = read_source(options.source, _import_role(options), _layout(options))
        plan = planning.plan_import(source, dtype=dtype, max_memory=memory, allowed=options.allow)
    else:
        saved = read_saved(options.source, options.role, options.hf)
        plan = planning.plan_export(saved, dtype=dtype, max_memory=memory, allowed=options.allow)
    print(json.dumps(planning.as_dict(plan), indent=1) if options.json else planning.as_text(plan))
    if plan.faults:
        raise ValueError("; ".join(plan.faults))
    return 0


def _import(options: argparse.Namespace) -> int:
    _need_hf(options.source)
    source = read_source(options.source, _import_role(options), _layout(options))
    import_model(
        source,
        options.target,
        dtype=_dtype(options),
        max_memory=size(options.max_memory),
        allowed=options.allow,
        overwrite=options.overwrite,
        verify=options.verify == "checksum",
    )
    print(f"written to {options.target}")
    return _verified(options, options.source, options.target, source.role, None)


def _export(options: argparse.Namespace) -> int:
    _need_checkpoint(options.source)
    saved = read_saved(options.source, options.role, options.hf)
    export_model(
        saved,
        options.target,
        dtype=_dtype(options),
        max_shard_size=size(options.max_shard_size),
        max_memory=size(options.max_memory),
        allowed=options.allow,
        overwrite=options.overwrite,
        verify=options.verify == "checksum",
    )
    print(f"written to {options.target}")
    return _verified(options, options.source, options.target, saved.role, options.hf)


def _verified(options: argparse.Namespace, source: Path, target: Path, role: str, like: Path | None) -> int:
    """What `--verify` asks for. Checksums were looked at before the result was put in place."""
    if options.verify == "logits":
        return _verify_logits(source, target, role, like, options.tokens, options.tolerance)
    if options.verify == "checksum":
        print("same: SHA-256 of every tensor")
    return 0


def _verify(options: argparse.Namespace) -> int:
    one, other, role, like = options.one, options.other, options.role, options.hf
    if options.method == "logits":
        return _verify_logits(one, other, role, like, options.tokens, options.tolerance)
    source, result = as_hf(one, role, like), as_hf(other, role, like)
    with counting("verifying", sum(spec.nbytes for spec in result.specs.values())) as on_bytes:
        found, faults = comparing.checksums(source, result, on_bytes)
    for fault in faults:
        print(fault)
    print(f"{'NOT the same' if faults else 'same'}: {len(found)} tensors, SHA-256 of each")
    return int(bool(faults))


def _verify_logits(one: Path, other: Path, role: str | None, like: Path | None, count: int, tolerance: float) -> int:
    # Imported late: only this builds models.
    from megatron_rl.convert.logits import agreement, draw, outputs

    vocab_size = load_shape(one if is_hf(one) else read_saved(one, role, like).like).vocab_size
    tokens = draw(vocab_size, count)
    found = agreement(outputs(one, role, like, tokens), outputs(other, role, like, tokens))
    same = found.largest <= tolerance
    print(
        f"{'same' if same else 'NOT the same'}: of {count} tokens outputs differ by at most {found.largest:.3g} "
        f"(tolerance {tolerance:g}), and {found.same_argmax:.1%} have the same likeliest token"
    )
    return int(not same)


def _inspect(options: argparse.Namespace) -> int:
    held = inspecting.inspect(options.source)
    print(json.dumps(held, indent=1) if options.json else inspecting.as_text(held, tensors=options.tensors))
    return 0


def _diff(options: argparse.Namespace) -> int:
    one, other = to_compare(options.one, options.other, options.role, options.hf)
    with counting("comparing", sum(spec.nbytes for spec in one.specs.values())) as on_bytes:
        found = list(comparing.differences(one, other, on_bytes))
    if options.json:
        print(json.dumps([difference._asdict() for difference in found], indent=1))
    else:
        for difference in found:
            print(f"{difference.name}: {difference.what}")
        print(f"{len(found)} differences" if found else f"no difference in {len(one.specs)} tensors")
    return int(bool(found))


def _reshard(options: argparse.Namespace) -> int:
    _need_checkpoint(options.source)
    memory = size(options.max_memory)
    reshard(options.source, options.target, layout=_layout(options), max_memory=memory, overwrite=options.overwrite)
    print(f"written to {options.target}")
    return 0


_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "import": _import,
    "export": _export,
    "verify": _verify,
    "inspect": _inspect,
    "diff": _diff,
    "reshard": _reshard,
}


def _layout(options: argparse.Namespace) -> Layout:
    for name in Layout.__dataclass_fields__:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}")
    return Layout(**{name: getattr(options, name) for name in Layout.__dataclass_fields__})


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    return getattr(torch, options.dtype) if options.dtype else None


def _import_role(options: argparse.Namespace) -> str:
    role = options.role or "actor"
    if role not in ROLES_OF_IMPORT:
        raise ValueError(f"--role {role}: a Hugging Face directory becomes an {' or a '.join(ROLES_OF_IMPORT)}")
    return str(role)


def _need_hf(path: Path) -> None:
    if not is_hf(path):
        raise ValueError(f"{path} is a checkpoint or a run, and import takes a Hugging Face directory: use export")


def _need_checkpoint(path: Path) -> None:
    if is_hf(path):
        raise ValueError(f"{path} is a Hugging Face directory, and this takes a checkpoint or a run: use import")
