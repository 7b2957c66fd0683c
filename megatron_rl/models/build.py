"""From a model's shape to megatron-core's GPTModel, one chunk per virtual pipeline stage of this rank."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

import megatron_rl.parallel.device as device
from megatron_rl.models.embedding import Embedding
from megatron_rl.models.hf_config import Experts, ModelShape, check_layout, layers_on_last_stage
from megatron_rl.models.hf_map import SCALAR_HEAD, Heads, WeightMap
from megatron_rl.models.layer_specs import layer_spec
from megatron_rl.models.transformer_engine import accumulates_weight_gradients
from megatron_rl.ops.vocab_shard import VocabShard
from megatron_rl.parallel.mesh import Mesh

# isort: split
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig

# Tensor cores want rows in multiples of 16; the padding is masked everywhere and never exported.
VOCAB_ROWS_MULTIPLE = 16


def padded_vocab_rows(vocab_size: int, tp_size: int) -> int:
    """Rows of the embedding on one tensor-parallel rank."""
    rows = -(-vocab_size // tp_size)
    return -(-rows // VOCAB_ROWS_MULTIPLE) * VOCAB_ROWS_MULTIPLE


class LanguageModel(GPTModel):
    """GPTModel whose last stage returns final hidden states: the loss owns the vocabulary.

    The output layer keeps its weight (for tying, sharding and checkpoints), but is never applied here.
    """

    shape: ModelShape
    shard: VocabShard
    ep_rank: int
    experts_per_rank: int  # 0 in a dense model

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def head_weight(self) -> Parameter:
        """This rank's rows of the output layer, [padded rows, hidden]; the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


class ValueModel(LanguageModel):
    """GPTModel with a scalar head in place of the vocabulary's: the last stage returns values [T, 1, 1], float32.

    Every tensor-parallel rank has the whole head, and reads all of the hidden states: each gradient is complete where
    it arises, so it is neither summed on its way back into the body nor over the ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = torch.nn.Linear(self.config.hidden_size, 1, bias=False)

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return F.linear(hidden_states.float(), self.output_layer.weight.float())


def transformer_config(shape: ModelShape, mesh: Mesh, dtype: torch.dtype) -> TransformerConfig:
    """megatron-core's config. Its fused CUDA kernels are on where there is CUDA."""
    on_cuda = not device.ON_CPU
    uneven = shape.num_layers % mesh.pp_size != 0
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=device.ON_CPU,  # the layer spec's own
        add_bias_linear=False,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=mesh.tp_size,
        pipeline_model_parallel_size=mesh.pp_size,
        virtual_pipeline_model_parallel_size=mesh.vpp_size if mesh.vpp_size > 1 else None,
        num_layers_in_last_pipeline_stage=layers_on_last_stage(shape.num_layers, mesh.pp_size) if uneven else None,
        sequence_parallel=mesh.sequence_parallel,
        recompute_granularity="full" if mesh.recompute else None,
        recompute_method="uniform" if mesh.recompute else None,
        recompute_num_layers=1 if mesh.recompute else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=device.ON_CPU,
        # The drawn weights are overwritten, but drawing marks which are sharded, and the gradient norm needs that.
        perform_initialization=True,
        # Packed micro-batches differ in length; megatron-core asks for this dispatcher even in dense models.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        **_mixture(shape.experts, mesh),
        # Losses carry weights that sum to one over the global mini-batch: nothing divides after them.
        calculate_per_token_loss=True,
        bias_activation_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        masked_softmax_fusion=on_cuda,
        persist_layer_norm=on_cuda,
        apply_rope_fusion=True,
        gradient_accumulation_fusion=device.ON_CPU or accumulates_weight_gradients(),
        # On gloo a send may still read the output: freeing it gave wrong gradients without an error.
        deallocate_pipeline_outputs=on_cuda,
        batch_p2p_comm=mesh.vpp_size == 1,
        overlap_p2p_comm=mesh.vpp_size > 1,
    )


def _mixture(experts: Experts | None, mesh: Mesh) -> dict[str, Any]:
    """The options of a mixture of experts: no token is dropped, and no loss beside the run's own is added."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.top_k,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        # A softmax over the chosen logits is the softmax over all of them, normalised.
        "moe_router_pre_softmax": not experts.norm_topk,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": not device.ON_CPU,
        "expert_model_parallel_size": mesh.ep_size,
        "expert_tensor_parallel_size": mesh.etp_size,
    }


def build_model(shape: ModelShape, mesh: Mesh, dtype: torch.dtype) -> list[LanguageModel]:
    """This rank's chunks, with undefined weights: load a checkpoint into them."""
    check_layout(shape, mesh.layout)
    config = transformer_config(shape, mesh, dtype)
    rows = padded_vocab_rows(shape.vocab_size, mesh.tp_size)
    chunks = []
    for index in range(mesh.vpp_size):
        vp_stage = index if mesh.vpp_size > 1 else None
        model = (ValueModel if shape.scalar else LanguageModel)(
            config=config,
            transformer_layer_spec=layer_spec(config, vp_stage),
            vocab_size=rows * mesh.tp_size,
            max_sequence_length=shape.max_positions,
            pre_process=mesh.pp_rank == 0 and index == 0,
            post_process=mesh.is_last_stage and index == mesh.vpp_size - 1,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        if model.pre_process:
            Embedding.take(model.embedding.word_embeddings)
        model.shape = shape
        model.ep_rank = mesh.ep_rank
        model.experts_per_rank = shape.experts.num_experts // mesh.ep_size if shape.experts else 0
        model.shard = VocabShard.of(shape.vocab_size, rows, mesh.tp_rank, mesh.tp_group)
        # megatron-core knows only some stretched frequencies, and hard-codes their constants; these are exact.
        model.rotary_pos_emb.inv_freq = shape.inv_freq.to(device.device())
        chunks.append(model.to(device=device.device(), dtype=dtype))
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                # Which ranks hold copies of it: with one expert rank megatron-core takes them for those of the rest,
                # which they are not where etp is not tp.
                parameter.allreduce = False
    return chunks


def weight_map(shape: ModelShape) -> WeightMap:
    """The rules of the model's family, layer by layer, and the head that the model has."""
    rules = [rule for rule in shape.family.rules if not (shape.scalar and rule.megatron == SCALAR_HEAD.megatron)]
    return WeightMap(
        [*rules, SCALAR_HEAD] if shape.scalar else rules,
        num_layers=shape.num_layers,
        num_experts=shape.experts.num_experts if shape.experts else 0,
        tied=shape.tied,
    )


def heads(shape: ModelShape) -> Heads:
    """The part of the shape that the weight map's algebra needs."""
    return Heads(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size)
