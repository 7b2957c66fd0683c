"""What a transformer layer is built of: Transformer Engine's modules on CUDA, torch's on the CPU."""

import megatron_rl.parallel.device as device

# isort: split
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_rl.models import transformer_engine
from megatron_rl.models.attention import PackedAttention
from megatron_rl.models.torch_layers import RMSNorm, SwiGLU


def local_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """megatron-core's local layer with packed attention and a norm that supports sequence parallelism."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, normalization="RMSNorm", qk_layernorm=config.qk_layernorm
    )
    parts = layer.submodules
    if config.num_moe_experts:
        # Experts have no linear layer that Transformer Engine fuses this norm into, so checkpoints keep its own name.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    mlp = parts.mlp.submodules
    (mlp.experts.submodules if config.num_moe_experts else mlp).activation_func = SwiGLU
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules | ModuleSpec:
    """The spec for this machine's device."""
    if device.ON_CPU:
        return local_layer_spec(config, vp_stage)
    transformer_engine.check()
    return fused_layer_spec(config)


def fused_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's layer: norms fused into the linear layers behind them, all experts multiplied at once."""
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
    )
