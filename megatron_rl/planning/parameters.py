"""The parameters of one rank, and what megatron-core's DDP and distributed optimizer keep of them."""

import math
from dataclasses import dataclass

from megatron_rl.models.build import padded_vocab_rows
from megatron_rl.models.hf_config import ModelShape, layers_on_last_stage
from megatron_rl.planning.layout import Layout

FLOAT32 = 4
# Elements that megatron-core aligns a parameter, and the end of a bucket, to (core/distributed/param_and_grad_buffer.py).
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True, slots=True)
class Buckets:
    """The elements of each parameter of one model chunk, by the bucket that they lie in."""

    dense: tuple[int, ...]
    shared: tuple[int, ...] = ()  # a tied embedding that a pipeline holds at both ends has a bucket of its own

    def __iter__(self):  # type: ignore[no-untyped-def]
        return (bucket for bucket in (self.dense, self.shared) if bucket)

    @property
    def elements(self) -> int:
        return sum(map(sum, self))


def layers_per_chunk(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Layers of each model chunk of a stage; where stages do not divide the layers the last has fewer."""
    if layout.vpp > 1:
        return shape.num_layers // (layout.pp * layout.vpp)
    last = layers_on_last_stage(shape.num_layers, layout.pp)
    return last if stage == layout.pp - 1 else -(-shape.num_layers // layout.pp)


def layer_parameters(shape: ModelShape, layout: Layout) -> tuple[int, ...]:
    """Elements of each parameter of a transformer layer on one tensor-parallel rank."""
    hidden, heads, kv_heads = shape.hidden_size, shape.num_heads // layout.tp, shape.num_kv_heads // layout.tp
    queries_keys_values = (heads + 2 * kv_heads) * shape.head_dim
    attention = [heads * shape.head_dim * hidden, queries_keys_values * hidden]
    if shape.family.qkv_bias:
        attention.append(queries_keys_values)
    if shape.family.qk_norm:
        attention += [shape.head_dim] * 2
    ffn = shape.ffn_hidden_size // layout.tp
    return (*attention, hidden, hidden, 2 * ffn * hidden, ffn * hidden)


def vocabulary_rows(shape: ModelShape, layout: Layout) -> int:
    return padded_vocab_rows(shape.vocab_size, layout.tp)


def chunk_parameters(shape: ModelShape, layout: Layout, stage: int) -> list[Buckets]:
    """The parameters of each model chunk of a stage: embedding first, final norm and head last."""
    vocabulary = vocabulary_rows(shape, layout) * shape.hidden_size
    layers = layer_parameters(shape, layout) * layers_per_chunk(shape, layout, stage)
    chunks = []
    for index in range(layout.vpp):
        dense, shared = list(layers), []
        first, last = stage == 0 and index == 0, stage == layout.pp - 1 and index == layout.vpp - 1
        tied_ends = shape.tied and layout.pp > 1
        if first:
            (shared if tied_ends else dense).append(vocabulary)
        if last:
            dense.append(shape.hidden_size)
            if shape.scalar:
                dense.append(shape.hidden_size)
            elif not shape.tied:
                dense.append(vocabulary)
            elif tied_ends:
                shared.append(vocabulary)
        chunks.append(Buckets(tuple(dense), tuple(shared)))
    return chunks


def padded(bucket: tuple[int, ...], dp: int) -> int:
    """Elements of a bucket: each parameter starts at a multiple of 64, and data-parallel ranks share it equally."""
    aligned = sum(-(-n // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT for n in bucket)
    multiple = math.lcm(dp, BUCKET_ALIGNMENT)
    return -(-aligned // multiple) * multiple


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """What a model on one rank keeps."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0  # if one is kept
    largest_bucket: int = 0  # in float32

    @property
    def together(self) -> int:
        return self.weights + self.gradients + self.optimizer


def frozen_model(shape: ModelShape, layout: Layout, stage: int, width: int) -> ModelBytes:
    """A model that is only read: `width` bytes for each parameter."""
    return ModelBytes(weights=width * sum(chunk.elements for chunk in chunk_parameters(shape, layout, stage)))


def trained_model(shape: ModelShape, layout: Layout, stage: int, width: int) -> ModelBytes:
    """A model under training, of P parameters with padding, `width` bytes each:

        weights width P,    gradients 4 P,    optimizer 4 n P / dp,    an average of the weights 4 P / dp

    n is 2 for Adam's moments, and 3 where float32 master weights are kept beside narrower ones.
    """
    sizes = [padded(bucket, layout.dp) for chunk in chunk_parameters(shape, layout, stage) for bucket in chunk]
    total = sum(sizes)
    share = FLOAT32 * total // layout.dp
    return ModelBytes(
        weights=width * total,
        gradients=FLOAT32 * total,
        optimizer=optimizer_tensors(width) * share,
        average=share,
        largest_bucket=FLOAT32 * max(sizes),
    )


def optimizer_tensors(width: int) -> int:
    """Float32 numbers that Adam keeps of a weight of `width` bytes."""
    return 2 if width == FLOAT32 else 3
