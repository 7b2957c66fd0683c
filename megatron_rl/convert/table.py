"""The table of a conversion: every tensor of a checkpoint, what it is made of, and how a layout cuts it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_rl.convert.rows import Run, runs
from megatron_rl.models.build import heads, padded_vocab_rows
from megatron_rl.models.families import FAMILIES
from megatron_rl.models.hf_config import ModelShape, check_layout, layers_on_last_stage
from megatron_rl.models.hf_map import (
    FUSED_QKV,
    GATED_LINEAR,
    REPLICATED,
    ROW_PARALLEL,
    SCALAR_HEAD,
    VOCABULARY,
    Kind,
    Rule,
)

LAYER = "decoder.layers."
# Of checkpoints, in megatron-core's sharded format: Transformer Engine's fused norms give the names.
FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
KIND_NAMES = {
    REPLICATED: "replicated",
    VOCABULARY: "vocabulary",
    ROW_PARALLEL: "row parallel",
    GATED_LINEAR: "gated linear",
    FUSED_QKV: "fused qkv",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Into how many parts a model is cut."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1

    def check(self, shape: ModelShape) -> None:
        """Refuses what does not divide the model."""
        check_layout(shape, tp=self.tp, pp=self.pp, vpp=self.vpp)

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The pipeline stage of a layer; with `vpp` the stages take turns."""
        if self.vpp > 1:
            return layer // (num_layers // (self.pp * self.vpp)) % self.pp
        if layer >= num_layers - layers_on_last_stage(num_layers, self.pp):
            return self.pp - 1
        return layer // -(-num_layers // self.pp)


@dataclass(frozen=True, slots=True)
class Piece:
    """One layer's tensor of a line, and the Hugging Face tensors that it is made of."""

    line: "Line"
    index: tuple[int, ...]
    hf: tuple[str, ...]
    stage: int

    @property
    def group(self) -> tuple[int, ...]:
        """Those who read it first: a pipeline stage."""
        return (self.stage,)


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor of a checkpoint: what a rule makes, of all layers together.

    `shape` is that of one layer's tensor, unsharded, the vocabulary padded; `stack` the dimensions before it, one per
    number in the rule's names. `hf_shapes` are those of the Hugging Face tensors of one layer.
    """

    key: str
    rule: Rule
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    runs: tuple[Run, ...]
    row_parts: int  # how many parts the layout cuts rows, and columns, into
    column_parts: int

    @property
    def halves(self) -> int:
        """How many tensors a rank has its part of, one behind the other."""
        return 2 if self.rule.kind is GATED_LINEAR else 1

    @property
    def whole(self) -> tuple[int, ...]:
        return (*self.stack, *self.shape)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Of every layer; () where there are none."""
        yield from ((layer,) for layer in range(self.stack[0])) if self.stack else ((),)

    def hf(self, index: tuple[int, ...]) -> tuple[str, ...]:
        return tuple(name.format(layer=index[0]) for name in self.rule.hf) if index else self.rule.hf


def table(shape: ModelShape, layout: Layout) -> list[Line]:
    """Every tensor that a checkpoint of the model holds, in the order of the family's rules."""
    layout.check(shape)
    rules = [rule for rule in shape.family.rules if not (shape.scalar and rule.megatron == SCALAR_HEAD.megatron)]
    if shape.scalar:
        rules.append(SCALAR_HEAD)
    elif shape.tied:
        rules = [rule for rule in rules if rule.megatron != SCALAR_HEAD.megatron]
    return [_line(rule, shape, layout) for rule in rules]


def _line(rule: Rule, shape: ModelShape, layout: Layout) -> Line:
    whole = _tensor_shape(rule.megatron, shape, layout)
    parts = runs(rule.kind, whole[0], heads(shape))
    counts = [sum(run.rows for run in parts if run.source == source) for source in range(len(rule.hf))]
    halves = 2 if rule.kind is GATED_LINEAR else 1
    return Line(
        key=checkpoint_key(rule.megatron),
        rule=rule,
        stack=(shape.num_layers,) if rule.per_layer else (),
        shape=whole,
        hf_shapes=tuple((count, *whole[1:]) for count in counts),
        runs=parts,
        row_parts=halves * layout.tp if rule.kind in (VOCABULARY, GATED_LINEAR, FUSED_QKV) else 1,
        column_parts=layout.tp if rule.kind is ROW_PARALLEL else 1,
    )


def checkpoint_key(megatron: str) -> str:
    """A parameter's name in a checkpoint: the layers are stacked under one name."""
    name = megatron.replace("{layer}.", "")
    for plain, fused in FUSED_NORMS.items():
        name = name.replace(LAYER + plain, LAYER + fused)
    return name


def _tensor_shape(megatron: str, shape: ModelShape, layout: Layout) -> tuple[int, ...]:
    """Of one layer's tensor, unsharded; the vocabulary's rows padded for the layout."""
    hidden, mlp = shape.hidden_size, shape.ffn_hidden_size
    queries, pairs = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    vocabulary = (padded_vocab_rows(shape.vocab_size, layout.tp) * layout.tp, hidden)
    return {
        "embedding.word_embeddings.weight": vocabulary,
        "output_layer.weight": (1, hidden) if shape.scalar else vocabulary,
        "decoder.final_layernorm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "pre_mlp_layernorm.weight": (hidden,),
        "self_attention.linear_qkv.weight": (queries + pairs, hidden),
        "self_attention.linear_qkv.bias": (queries + pairs,),
        "self_attention.q_layernorm.weight": (shape.head_dim,),
        "self_attention.k_layernorm.weight": (shape.head_dim,),
        "self_attention.linear_proj.weight": (hidden, queries),
        "mlp.linear_fc1.weight": (2 * mlp, hidden),
        "mlp.linear_fc2.weight": (hidden, mlp),
    }[megatron.removeprefix(LAYER + "{layer}.")]


def hf_shapes(lines: Sequence[Line]) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model, and its shape."""
    return {
        name: shape
        for line in lines
        for index in line.indices()
        for name, shape in zip(line.hf(index), line.hf_shapes, strict=True)
    }


def pieces(lines: Sequence[Line], shape: ModelShape, layout: Layout) -> list[Piece]:
    """All tensors, a layer's together, in the model's order: what comes before the layers, they, and what follows."""
    outside = [line for line in lines if not line.stack]
    first = [line for line in outside if line.key.startswith("embedding.")]
    last = [line for line in outside if not line.key.startswith("embedding.")]
    layers = [line for line in lines if line.stack]
    found = [Piece(line, (), line.hf(()), 0) for line in first]
    for layer in range(shape.num_layers):
        stage = layout.stage_of(layer, shape.num_layers)
        found += [Piece(line, (layer,), line.hf((layer,)), stage) for line in layers]
    return found + [Piece(line, (), line.hf(()), layout.pp - 1) for line in last]


def shape_of(identity: Mapping[str, Any]) -> ModelShape:
    """The shape that a checkpoint says its model has. Of the rotary frequencies it has no more than a hash."""
    names = ModelShape.__dataclass_fields__
    known = {name: value for name, value in identity.items() if name in names}
    return ModelShape(**{**known, "family": FAMILIES[identity["family"]], "inv_freq": torch.empty(0)})


def kind_name(kind: Kind) -> str:
    return KIND_NAMES[kind]
