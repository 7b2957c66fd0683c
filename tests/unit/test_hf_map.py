"""The weight map's algebra: cut and merge are inverse, shard by shard, and reads stay inside the shard."""

import pytest
import torch
from torch import Tensor

from megatron_rl.models.families import llama, qwen2
from megatron_rl.models.hf_map import (
    FUSED_QKV,
    GATED_LINEAR,
    REPLICATED,
    ROW_PARALLEL,
    VOCABULARY,
    Heads,
    WeightMap,
    canonical_name,
)

GEOMETRY = Heads(num_heads=8, num_kv_heads=4, head_dim=6, vocab_size=99)
HIDDEN, MLP = 20, 24


class Tensors:
    """A reader over tensors in memory that counts what it hands out."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors, self.elements = tensors, 0

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._count(self.tensors[name][start:stop])

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        return self._count(self.tensors[name][:, start:stop])

    def _count(self, part: Tensor) -> Tensor:
        self.elements += part.numel()
        return part


def numbers(*shape: int) -> Tensor:
    return torch.arange(float(torch.tensor(shape).prod())).reshape(shape)


CASES = {
    "replicated": (REPLICATED, {"a": numbers(HIDDEN)}),
    "vocabulary": (VOCABULARY, {"a": numbers(99, HIDDEN)}),
    "row": (ROW_PARALLEL, {"a": numbers(HIDDEN, MLP)}),
    "gated": (GATED_LINEAR, {"a": numbers(MLP, HIDDEN), "b": -numbers(MLP, HIDDEN)}),
    "qkv": (FUSED_QKV, {"a": numbers(48, HIDDEN), "b": -numbers(24, HIDDEN), "c": numbers(24, HIDDEN) + 0.5}),
    "qkv_bias": (FUSED_QKV, {"a": numbers(48), "b": -numbers(24), "c": numbers(24) + 0.5}),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_merge_undoes_read(case: str, size: int) -> None:
    kind, tensors = CASES[case]
    rows = 112 // size
    shards = []
    for rank in range(size):
        reader = Tensors(**tensors)
        shards.append(kind.read(reader, tuple(tensors), rank, size, rows, GEOMETRY))
        assert reader.elements <= shards[-1].numel()
    for merged, original in zip(kind.merge(shards, GEOMETRY), tensors.values(), strict=True):
        assert torch.equal(merged, original)


def test_fused_qkv_keeps_groups_together() -> None:
    """Group g of the fused tensor holds query heads 2g and 2g + 1, then key head g, then value head g."""
    q, k, v = numbers(48, 1), 100 + numbers(24, 1), 200 + numbers(24, 1)
    fused = FUSED_QKV.read(Tensors(q=q, k=k, v=v), ("q", "k", "v"), 1, 2, 0, GEOMETRY)
    # The second of two ranks starts with group 2: query rows 24.., key rows 12.., value rows 12..
    expected = torch.cat([q[24:36], k[12:18], v[12:18], q[36:48], k[18:24], v[18:24]])
    assert torch.equal(fused, expected)


def test_vocabulary_padding_is_zero_and_ranks_may_hold_nothing() -> None:
    reader = Tensors(a=numbers(99, 2) + 1)
    shards = [VOCABULARY.read(reader, ("a",), rank, 4, 50, GEOMETRY) for rank in range(4)]
    assert torch.equal(torch.cat(shards)[:99], numbers(99, 2) + 1)
    assert not shards[1][49:].any() and not shards[2].any() and not shards[3].any()


def test_tied_output_layer_is_the_embedding() -> None:
    tied = WeightMap(llama.RULES, num_layers=2, tied=True)
    assert tied["output_layer.weight"].hf == ("model.embed_tokens.weight",)
    assert "lm_head.weight" not in tied.hf_names()
    # Another map of the same family is not touched by it.
    untied = WeightMap(llama.RULES, num_layers=2, tied=False)
    assert untied["output_layer.weight"].hf == ("lm_head.weight",)


def test_names() -> None:
    rules = WeightMap(qwen2.RULES, num_layers=3, tied=False)
    assert rules["decoder.layers.2.self_attention.linear_qkv.bias"].hf[1] == "model.layers.2.self_attn.k_proj.bias"
    assert len(rules.hf_names()) == 3 + 3 * 12
    with pytest.raises(KeyError, match="no rule maps"):
        rules["decoder.layers.3.mlp.linear_fc1.weight"]
    fused = "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert canonical_name(fused) == "decoder.layers.0.pre_mlp_layernorm.weight"
    assert canonical_name("decoder.final_layernorm.weight") == "decoder.final_layernorm.weight"
