"""Qwen3 with a mixture of experts in every layer."""

from megatron_rl.models.families import llama, qwen3
from megatron_rl.models.hf_map import GATED_LINEAR, REPLICATED, ROW_PARALLEL, Rule

EXPERT = "model.layers.{layer}.mlp.experts.{expert}"

RULES = (
    *llama.BODY,
    *qwen3.QK_NORMS,
    Rule("decoder.layers.{layer}.mlp.router.weight", REPLICATED, ("model.layers.{layer}.mlp.gate.weight",)),
    Rule(
        "decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight",
        GATED_LINEAR,
        (f"{EXPERT}.gate_proj.weight", f"{EXPERT}.up_proj.weight"),
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight", ROW_PARALLEL, (f"{EXPERT}.down_proj.weight",)
    ),
)
