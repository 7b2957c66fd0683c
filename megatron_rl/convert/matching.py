"""Whether the tensors that are there are the tensors that the model has: none too few, none too many."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from megatron_rl.checkpoint.torch_dist import Spec
from megatron_rl.convert.table import Line, hf_shapes
from megatron_rl.convert.tensors import NAMES
from megatron_rl.models.hf_config import ModelShape

EMBEDDING, OUTPUT_LAYER = "model.embed_tokens.weight", "lm_head.weight"


def of_directory(
    specs: Mapping[str, Spec], lines: Sequence[Line], shape: ModelShape, allowed: Collection[str]
) -> Iterator[str]:
    """What is wrong with the tensors of a Hugging Face directory, a sentence each."""
    expected = hf_shapes(lines)
    for name in sorted(expected.keys() - specs.keys()):
        yield f"the directory lacks {name}, which {_maker(name, lines)} is made of"
    for name in sorted(specs.keys() - expected.keys() - set(allowed)):
        if not is_tied_copy(name, shape):
            yield f"nothing takes {name} {list(specs[name].shape)}; leave it out with --allow {name}"
    for name, wanted in expected.items():
        if name in specs and specs[name].shape != wanted:
            yield f"{name} is {list(specs[name].shape)} and the model's config asks for {list(wanted)}"
        elif name in specs and specs[name].dtype not in NAMES:
            dtype = str(specs[name].dtype).removeprefix("torch.")
            yield f"{name} is stored as {dtype}; {', '.join(NAMES.values())} can be converted"
    yield from (f"--allow {name}: the directory holds no such tensor" for name in sorted(set(allowed) - specs.keys()))


def of_checkpoint(
    specs: Mapping[str, Spec], lines: Sequence[Line], role: str, vocab_size: int, allowed: Collection[str]
) -> Iterator[str]:
    """What is wrong with the tensors that a checkpoint has of a role, a sentence each. The optimizer's do not count."""
    held = {key.removeprefix(f"{role}."): spec for key, spec in specs.items() if _is_weight(key, role)}
    expected = {line.key: line for line in lines}
    for key in sorted(expected.keys() - held.keys()):
        yield f"the checkpoint lacks {role}.{key}, which {' and '.join(expected[key].rule.hf)} are made of"
    for key in sorted(held.keys() - expected.keys() - set(allowed)):
        yield f"nothing takes {role}.{key} {list(held[key].shape)}; leave it out with --allow {key}"
    for key, line in expected.items():
        if key in held and not _fits(held[key].shape, line, vocab_size):
            yield f"{role}.{key} is {list(held[key].shape)} and its model's shape asks for {list(line.whole)}"
    yield from (f"--allow {key}: the checkpoint holds no {role}.{key}" for key in sorted(set(allowed) - held.keys()))


def refuse(complaints: Iterable[str], where: object) -> None:
    """One error for all that is wrong; the first three are told."""
    found = list(complaints)
    if found:
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(f"{where}: {'; '.join(found[:3])}{more}")


def dtypes(specs: Mapping[str, Spec], lines: Sequence[Line], asked: torch.dtype | None) -> dict[str, torch.dtype]:
    """The type of each tensor of a checkpoint: what was asked for, or the one that all its sources have."""
    found = {}
    for line in lines:
        held = {specs[name].dtype for index in line.indices() for name in line.hf(index)}
        if asked is None and len(held) > 1:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
            raise ValueError(f"{' and '.join(line.rule.hf)} are stored as {names}: choose one with --dtype")
        found[line.key] = asked or held.pop()
    return found


def is_tied_copy(name: str, shape: ModelShape) -> bool:
    """A tied model's files may have the embedding a second time, as the output layer."""
    return shape.tied and name == OUTPUT_LAYER


def left_out(shape: ModelShape, allowed: Collection[str]) -> frozenset[str]:
    """Tensors of a directory that no checkpoint has."""
    return frozenset(allowed) | ({OUTPUT_LAYER} if shape.tied else frozenset())


def _maker(name: str, lines: Sequence[Line]) -> str:
    return next(line.key for line in lines for index in line.indices() if name in line.hf(index))


def _is_weight(key: str, role: str) -> bool:
    return key.startswith(f"{role}.") and not key.startswith(f"{role}.optimizer.")


def _fits(held: tuple[int, ...], line: Line, vocab_size: int) -> bool:
    """Another layout pads the vocabulary to another number of rows."""
    if line.whole[:1] != held[:1] and not line.stack and line.hf_shapes[0][0] == vocab_size:
        return held[1:] == line.whole[1:] and held[0] >= vocab_size
    return held == line.whole
