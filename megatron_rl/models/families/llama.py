"""Llama: no biases. `BODY` is what families with other MLPs share."""

from megatron_rl.models.hf_map import FUSED_QKV, GATED_LINEAR, REPLICATED, ROW_PARALLEL, VOCABULARY, Rule

BODY = (
    Rule("embedding.word_embeddings.weight", VOCABULARY, ("model.embed_tokens.weight",)),
    Rule("output_layer.weight", VOCABULARY, ("lm_head.weight",)),
    Rule("decoder.final_layernorm.weight", REPLICATED, ("model.norm.weight",)),
    Rule("decoder.layers.{layer}.input_layernorm.weight", REPLICATED, ("model.layers.{layer}.input_layernorm.weight",)),
    Rule(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        REPLICATED,
        ("model.layers.{layer}.post_attention_layernorm.weight",),
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        FUSED_QKV,
        tuple(f"model.layers.{{layer}}.self_attn.{part}_proj.weight" for part in "qkv"),
    ),
    Rule(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        ROW_PARALLEL,
        ("model.layers.{layer}.self_attn.o_proj.weight",),
    ),
)

RULES = (
    *BODY,
    Rule(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        GATED_LINEAR,
        ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
    ),
    Rule("decoder.layers.{layer}.mlp.linear_fc2.weight", ROW_PARALLEL, ("model.layers.{layer}.mlp.down_proj.weight",)),
)
