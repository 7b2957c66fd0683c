"""The table of a conversion: every tensor of a checkpoint, what it is made of, and how a layout cuts it."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.models.build import heads, padded_vocab_rows
from megatron_rl.models.families import FAMILIES
from megatron_rl.models.hf_config import Experts, ModelShape, check_layout, layers_on_last_stage
from megatron_rl.models.hf_map import (
    FUSED_QKV,
    GATED_LINEAR,
    REPLICATED,
    ROW_PARALLEL,
    SCALAR_HEAD,
    VOCABULARY,
    Kind,
    Rule,
    Run,
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
    ep: int = 1
    etp: int = 1

    def check(self, shape: ModelShape) -> None:
        """Refuses what does not divide the model."""
        # That mixtures train with sequence parallelism does not matter to what is stored.
        check_layout(shape, ParallelConfig(**asdict(self), sequence_parallel=True))

    def stage_of(self, layer: int, num_layers: int) -> int:
        """The pipeline stage of a layer; with `vpp` the stages take turns."""
        if self.vpp > 1:
            return layer // (num_layers // (self.pp * self.vpp)) % self.pp
        if layer >= num_layers - layers_on_last_stage(num_layers, self.pp):
            return self.pp - 1
        return layer // -(-num_layers // self.pp)


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor of a checkpoint: what a rule makes, of all layers and experts together.

    `shape` is that of one layer's (and expert's) tensor, unsharded, the vocabulary padded; `stack` the dimensions
    before it, one per number in the rule's names. `hf_shapes` are those of the Hugging Face tensors that make one.
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
        """Of every layer, and of every expert in it; () where there are none."""
        yield from itertools.product(*map(range, self.stack))

    def hf(self, index: tuple[int, ...]) -> tuple[str, ...]:
        """The names with the numbers filled in."""
        numbers = dict(zip(("layer", "expert"), index))
        return tuple(name.format(**numbers) for name in self.rule.hf)


@dataclass(frozen=True, slots=True)
class Piece:
    """One layer's (and expert's) tensor of a line, on a pipeline stage and an expert-parallel rank (dense: -1)."""

    line: Line
    index: tuple[int, ...]
    stage: int
    expert_rank: int = -1

    @property
    def hf(self) -> tuple[str, ...]:
        return self.line.hf(self.index)


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
    runs = rule.kind.runs(whole[0], heads(shape))
    counts = [sum(run.rows for run in runs if run.source == source) for source in range(len(rule.hf))]
    ranks = layout.etp if rule.per_expert else layout.tp
    halves = 2 if rule.kind is GATED_LINEAR else 1
    experts = (shape.experts.num_experts,) if shape.experts and rule.per_expert else ()
    return Line(
        key=checkpoint_key(rule.megatron, shape),
        rule=rule,
        stack=((shape.num_layers,) if rule.per_layer else ()) + experts,
        shape=whole,
        hf_shapes=tuple((count, *whole[1:]) for count in counts),
        runs=runs,
        row_parts=halves * ranks if rule.kind in (VOCABULARY, GATED_LINEAR, FUSED_QKV) else 1,
        column_parts=ranks if rule.kind is ROW_PARALLEL else 1,
    )


def checkpoint_key(megatron: str, shape: ModelShape) -> str:
    """A parameter's name in a checkpoint: layers, and experts, are stacked under one name."""
    name = megatron.replace("{layer}.", "").replace("experts.{expert}.", "experts.experts.")
    for plain, fused in FUSED_NORMS.items():
        # Experts have no linear layer that a norm is fused into.
        if not (shape.experts and fused.startswith("mlp.")):
            name = name.replace(LAYER + plain, LAYER + fused)
    return name


def _tensor_shape(megatron: str, shape: ModelShape, layout: Layout) -> tuple[int, ...]:
    """Of one layer's (and expert's) tensor, unsharded; the vocabulary's rows padded for the layout."""
    hidden, mlp = shape.hidden_size, shape.ffn_hidden_size
    queries, pairs = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    vocabulary = (padded_vocab_rows(shape.vocab_size, layout.tp) * layout.tp, hidden)
    shapes: dict[str, tuple[int, ...]] = {
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
    }
    if shape.experts:
        inner = shape.experts.ffn_hidden_size
        shapes |= {
            "mlp.router.weight": (shape.experts.num_experts, hidden),
            "mlp.experts.{expert}.linear_fc1.weight": (2 * inner, hidden),
            "mlp.experts.{expert}.linear_fc2.weight": (hidden, inner),
        }
    return shapes[megatron.removeprefix(LAYER + "{layer}.")]


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
    found = [Piece(line, (), 0) for line in outside if line.key.startswith("embedding.")]
    for layer in range(shape.num_layers):
        stage = layout.stage_of(layer, shape.num_layers)
        for line in lines:
            for index in itertools.product((layer,), *map(range, line.stack[1:])) if line.stack else ():
                rank = index[1] * layout.ep // line.stack[1] if index[1:] else -1
                found.append(Piece(line, index, stage, rank))
    return found + [Piece(line, (), layout.pp - 1) for line in outside if not line.key.startswith("embedding.")]


def shape_of(identity: Mapping[str, Any]) -> ModelShape:
    """The shape that a checkpoint says its model has. Of the rotary frequencies it has no more than a hash."""
    known: dict[str, Any] = {item.name: identity.get(item.name) for item in fields(ModelShape)}
    known["family"] = FAMILIES[identity["family"]]
    known["experts"] = Experts(**known["experts"]) if known["experts"] else None
    return ModelShape(**{**known, "inv_freq": torch.empty(0)})


def kind_name(kind: Kind) -> str:
    return KIND_NAMES[kind]
