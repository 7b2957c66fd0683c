"""The parameters of one rank, and what megatron-core's DDP and distributed optimizer keep of them."""

import math
from dataclasses import dataclass

from megatron_rl.models.build import padded_vocab_rows
from megatron_rl.models.hf_config import ModelShape, layers_on_last_stage
from megatron_rl.planning.layout import Layout

FLOAT32 = 4
# Elements that megatron-core aligns a parameter and the end of a bucket to (distributed/param_and_grad_buffer.py).
PARAMETER_ALIGNMENT, BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The elements of each of its parameters, and how many ranks share out their optimizer state."""

    parameters: tuple[int, ...]
    shared_by: int

    @property
    def elements(self) -> int:
        return sum(self.parameters)

    @property
    def padded(self) -> int:
        """Elements with alignment: a parameter starts at a multiple of 64, and the ranks have equal shares."""
        aligned = sum(-(-n // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT for n in self.parameters)
        multiple = math.lcm(self.shared_by, BUCKET_ALIGNMENT)
        return -(-aligned // multiple) * multiple


def layers_per_chunk(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Layers of each model chunk of a stage; where stages do not divide the layers the last has fewer."""
    if layout.vpp > 1:
        return shape.num_layers // (layout.pp * layout.vpp)
    last = layers_on_last_stage(shape.num_layers, layout.pp)
    return last if stage == layout.pp - 1 else -(-shape.num_layers // layout.pp)


def layer_parameters(shape: ModelShape, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements of each parameter of a transformer layer on one rank: of those of all tokens, and of its experts."""
    hidden, heads, kv_heads = shape.hidden_size, shape.num_heads // layout.tp, shape.num_kv_heads // layout.tp
    queries_keys_values = (heads + 2 * kv_heads) * shape.head_dim
    dense = [heads * shape.head_dim * hidden, queries_keys_values * hidden, hidden, hidden]
    if shape.family.qkv_bias:
        dense.append(queries_keys_values)
    if shape.family.qk_norm:
        dense += [shape.head_dim] * 2
    if shape.experts is None:
        ffn = shape.ffn_hidden_size // layout.tp
        return (*dense, 2 * ffn * hidden, ffn * hidden), ()
    ffn = shape.experts.ffn_hidden_size // layout.etp
    router = shape.experts.num_experts * hidden
    return (*dense, router), (2 * ffn * hidden, ffn * hidden) * (shape.experts.num_experts // layout.ep)


def vocabulary_rows(shape: ModelShape, layout: Layout) -> int:
    """Rows of the embedding on one rank, padded."""
    return padded_vocab_rows(shape.vocab_size, layout.tp)


def buckets(shape: ModelShape, layout: Layout, stage: int) -> list[Bucket]:
    """The parameters of a stage: those of each model chunk, a tied embedding at either end of a pipeline, experts."""
    vocabulary = vocabulary_rows(shape, layout) * shape.hidden_size
    layers = layers_per_chunk(shape, layout, stage)
    of_all, of_experts = layer_parameters(shape, layout)
    found = []
    for index in range(layout.vpp):
        dense, ends = list(of_all * layers), list[int]()
        if stage == 0 and index == 0:
            (ends if shape.tied and layout.pp > 1 else dense).append(vocabulary)
        if stage == layout.pp - 1 and index == layout.vpp - 1:
            dense.append(shape.hidden_size)
            if shape.scalar:
                dense.append(shape.hidden_size)
            elif not shape.tied:
                dense.append(vocabulary)
            elif layout.pp > 1:
                ends.append(vocabulary)
        found += [Bucket(parameters=tuple(part), shared_by=layout.dp) for part in (dense, ends) if part]
        if of_experts:
            found.append(Bucket(parameters=of_experts * layers, shared_by=layout.expert_dp))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBytes:
    """What a model on one rank keeps."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    average: int = 0  # if one is kept
    gathered: int = 0  # in passing, where shares of float32 numbers are gathered


def frozen_model(shape: ModelShape, layout: Layout, stage: int, width: int) -> ModelBytes:
    """A model that is only read: `width` bytes for each parameter."""
    return ModelBytes(weights=width * sum(bucket.elements for bucket in buckets(shape, layout, stage)))


def trained_model(shape: ModelShape, layout: Layout, stage: int, width: int) -> ModelBytes:
    """A model under training: for each bucket of P parameters with padding, shared by d data-parallel ranks,

        weights width P,    gradients 4 P,    optimizer 4 n P / d,    an average of the weights 4 P / d

    n is 2 for Adam's moments, and 3 where float32 master weights are kept beside narrower ones. To write an average to
    its model, or a checkpoint, one parameter after the other is gathered where d is more than 1: 4 bytes an element.
    """
    held = buckets(shape, layout, stage)
    total = sum(bucket.padded for bucket in held)
    share = sum(FLOAT32 * bucket.padded // bucket.shared_by for bucket in held)
    gathered = [FLOAT32 * max(bucket.parameters) for bucket in held if bucket.shared_by > 1]
    return ModelBytes(
        weights=width * total,
        gradients=FLOAT32 * total,
        optimizer=optimizer_tensors(width) * share,
        average=share,
        gathered=max(gathered, default=0),
    )


def optimizer_tensors(width: int) -> int:
    """Float32 numbers that Adam keeps of a weight of `width` bytes."""
    return 2 if width == FLOAT32 else 3


def model_parameters(shape: ModelShape) -> int:
    """Of the whole model, tied ones once, without padding."""
    of_all, of_experts = layer_parameters(shape, Layout())
    head = shape.hidden_size if shape.scalar else 0 if shape.tied else shape.vocab_size * shape.hidden_size
    layers = shape.num_layers * (sum(of_all) + sum(of_experts))
    return layers + shape.vocab_size * shape.hidden_size + shape.hidden_size + head
