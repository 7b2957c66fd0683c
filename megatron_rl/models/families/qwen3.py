"""Qwen3, dense: Llama with a norm on every query and key head."""

from megatron_rl.models.families import llama
from megatron_rl.models.hf_map import REPLICATED, Rule

QK_NORMS = tuple(
    Rule(
        f"decoder.layers.{{layer}}.self_attention.{part}_layernorm.weight",
        REPLICATED,
        (f"model.layers.{{layer}}.self_attn.{part}_norm.weight",),
    )
    for part in "qk"
)

RULES = (*llama.RULES, *QK_NORMS)
