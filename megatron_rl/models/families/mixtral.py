"""Mixtral: Llama with a mixture of experts in every layer; w1 is the gate, w3 the other input, w2 the output."""

from megatron_rl.models.families import llama
from megatron_rl.models.hf_map import GATED_LINEAR, REPLICATED, ROW_PARALLEL, Rule

MIXTURE = "model.layers.{layer}.block_sparse_moe"

RULES = (
    *llama.BODY,
    Rule("decoder.layers.{layer}.mlp.router.weight", REPLICATED, (f"{MIXTURE}.gate.weight",)),
    Rule(
        "decoder.layers.{layer}.mlp.experts.{expert}.linear_fc1.weight",
        GATED_LINEAR,
        (f"{MIXTURE}.experts.{{expert}}.w1.weight", f"{MIXTURE}.experts.{{expert}}.w3.weight"),
    ),
    Rule(
        "decoder.layers.{layer}.mlp.experts.{expert}.linear_fc2.weight",
        ROW_PARALLEL,
        (f"{MIXTURE}.experts.{{expert}}.w2.weight",),
    ),
)
