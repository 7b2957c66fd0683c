"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from megatron_rl.models.families import llama
from megatron_rl.models.hf_map import FUSED_QKV, Rule

RULES = (
    *llama.RULES,
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        FUSED_QKV,
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.bias" for part in "qkv"),
    ),
)
