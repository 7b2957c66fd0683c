"""The algebra of the weight map: how one Megatron parameter, sharded over tensor-parallel ranks, is made of Hugging
Face tensors. Pure: slices in, tensors out, no collectives.

A `Rule` names a Megatron parameter, the Hugging Face tensors it is made of, and the `Kind` that says how. A kind reads
one rank's shard by slices (so that no rank reads more than it keeps) and merges all shards back, exactly.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Reader(Protocol):
    """Slices of named tensors in a Hugging Face checkpoint."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, cut off at the tensor's end."""

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of the second dimension."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention geometry a fused QKV needs: query heads, key/value heads, head size, and the true vocabulary."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


class Run(NamedTuple):
    """`rows` rows from row `start` of Hugging Face tensor number `source` on are those from row `at` on here."""

    source: int
    start: int
    at: int
    rows: int


class Kind(Protocol):
    """How a Megatron parameter is cut from and put together into Hugging Face tensors."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        """Shard `rank` of `size`; `rows` is the first dimension of the local parameter."""

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        """The full tensors, in the rule's order, from the shards of all ranks."""

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        """Where the rows of the parameter, unsharded and of `rows` rows, come from, in order. The rest is padding.

        Row by row a tensor of any size is converted in blocks, in both directions.
        """


def _block(source: Reader, name: str, rank: int, size: int) -> Tensor:
    """Block `rank` of `size` equal blocks of rows."""
    rows = source.shape(name)[0] // size
    return source.rows(name, rank * rows, (rank + 1) * rows)


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """One after the other; a single part as it is, without a copy."""
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


class Replicated:
    """The same on every rank."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        return source.rows(names[0], 0, source.shape(names[0])[0])

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        return (shards[0],)

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        return (Run(0, 0, 0, rows),)


class Vocabulary:
    """Rows cut over the ranks; zero rows pad the end, and are cut off again."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        held = source.rows(names[0], rank * rows, (rank + 1) * rows)
        return torch.cat([held, held.new_zeros(rows - held.shape[0], *held.shape[1:])])

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        return (_joined(shards)[: heads.vocab_size],)

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        return (Run(0, 0, 0, heads.vocab_size),)


class RowParallel:
    """The input dimension (columns) cut over the ranks."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        columns = source.shape(names[0])[1] // size
        return source.columns(names[0], rank * columns, (rank + 1) * columns)

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        return (_joined(shards, dim=1),)

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        return (Run(0, 0, 0, rows),)


class GatedLinear:
    """Each rank holds [gate_rank; up_rank]."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        return torch.cat([_block(source, name, rank, size) for name in names])

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        halves = [shard.chunk(2) for shard in shards]
        return tuple(_joined([half[i] for half in halves]) for i in range(2))

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        half = rows // 2
        return (Run(0, 0, 0, half), Run(1, 0, half, half))


class FusedQKV:
    """Per query group [q ... q k v], the groups cut over the ranks. Weights and biases alike."""

    def read(self, source: Reader, names: Sequence[str], rank: int, size: int, rows: int, heads: Heads) -> Tensor:
        groups, per_group = heads.num_kv_heads // size, heads.num_heads // heads.num_kv_heads
        q, k, v = (_block(source, name, rank, size) for name in names)
        rest = q.shape[1:]
        return torch.cat(
            [
                q.reshape(groups, per_group * heads.head_dim, *rest),
                k.reshape(groups, heads.head_dim, *rest),
                v.reshape(groups, heads.head_dim, *rest),
            ],
            dim=1,
        ).reshape(-1, *rest)

    def merge(self, shards: Sequence[Tensor], heads: Heads) -> tuple[Tensor, ...]:
        full = _joined(shards)
        rest = full.shape[1:]
        queries = heads.num_heads // heads.num_kv_heads * heads.head_dim
        grouped = full.reshape(heads.num_kv_heads, queries + 2 * heads.head_dim, *rest)
        q, k, v = grouped.split([queries, heads.head_dim, heads.head_dim], dim=1)
        return tuple(part.reshape(-1, *rest) for part in (q, k, v))

    def runs(self, rows: int, heads: Heads) -> tuple[Run, ...]:
        queries, size = heads.num_heads // heads.num_kv_heads * heads.head_dim, heads.head_dim
        found: list[Run] = []
        for group in range(heads.num_kv_heads):
            at = group * (queries + 2 * size)
            found.append(Run(0, group * queries, at, queries))
            found.append(Run(1, group * size, at + queries, size))
            found.append(Run(2, group * size, at + queries + size, size))
        return tuple(found)


REPLICATED, VOCABULARY, ROW_PARALLEL = Replicated(), Vocabulary(), RowParallel()
GATED_LINEAR, FUSED_QKV = GatedLinear(), FusedQKV()


@dataclass(frozen=True, slots=True)
class Rule:
    """`megatron` parameter, made of the tensors `hf`; "{layer}" and "{expert}" stand for numbers in both."""

    megatron: str
    kind: Kind
    hf: tuple[str, ...]

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.megatron

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron


# As transformers' classes for sequence and token classification name it.
SCALAR_HEAD = Rule("output_layer.weight", REPLICATED, ("score.weight",))


@dataclass(frozen=True, slots=True)
class Match:
    """A rule applied to one parameter. An expert's number is through the whole layer."""

    rule: Rule
    layer: int
    expert: int | None

    @property
    def kind(self) -> Kind:
        return self.rule.kind

    @property
    def megatron(self) -> str:
        return self.rule.megatron.format(layer=self.layer, expert=self.expert)

    @property
    def hf(self) -> tuple[str, ...]:
        return tuple(name.format(layer=self.layer, expert=self.expert) for name in self.rule.hf)


class WeightMap:
    """All rules of one model, by Megatron name. Tied models have no tensor of their own for the output layer."""

    def __init__(self, rules: Sequence[Rule], *, num_layers: int, num_experts: int = 0, tied: bool) -> None:
        self.matches: dict[str, Match] = {}
        for rule in rules:
            layers = range(num_layers) if rule.per_layer else (0,)
            experts = range(num_experts) if rule.per_expert else (None,)
            for layer, expert in itertools.product(layers, experts):
                match = Match(rule, layer, expert)
                self.matches[match.megatron] = match
        self.tied_to_embedding = self._tie() if tied else frozenset[str]()

    def _tie(self) -> frozenset[str]:
        """Points the output layer at the embedding's tensor; on export it is left out."""
        embedding = self.matches["embedding.word_embeddings.weight"]
        self.matches["output_layer.weight"] = embedding
        return frozenset({"output_layer.weight"})

    def __getitem__(self, name: str) -> Match:
        if name not in self.matches:
            raise KeyError(f"no rule maps the Megatron parameter {name!r} to Hugging Face tensors")
        return self.matches[name]

    def hf_names(self) -> frozenset[str]:
        """Every Hugging Face tensor the model is made of."""
        return frozenset(name for match in self.matches.values() for name in match.hf)


GROUPED_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$")


def canonical_name(name: str) -> str:
    """The plain spelling of a name: Transformer Engine fuses a norm into the linear layer behind it.

    An expert is `mlp.experts.3.linear_fc1.weight`, which megatron-core spells `mlp.experts.local_experts.3.linear_fc1.
    weight` or, where Transformer Engine multiplies all experts at once, `mlp.experts.linear_fc1.weight3`.
    """
    name = name.replace(".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight")
    name = name.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
    name = name.replace(".mlp.experts.local_experts.", ".mlp.experts.")
    return GROUPED_EXPERT.sub(r".mlp.experts.\2.\1.weight", name)
