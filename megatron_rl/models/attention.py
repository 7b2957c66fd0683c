"""Core attention for the layer spec without Transformer Engine."""

from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)

# isort: split
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule


def packed_seq_params(cu_seqlens: Tensor, max_seqlen: int) -> PackedSeqParams:
    """Sequences lie end to end on one axis; `cu_seqlens` [S + 1] int32 holds their borders."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
    )


class PackedAttention(MegatronModule):
    """Causal attention inside each packed sequence by `scaled_dot_product_attention`, with grouped queries.

    Takes the place of megatron-core's DotProductAttention, which refuses packed sequences. Neighbours of equal length
    share one call.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0.0, "attention dropout is not built"
        assert config.context_parallel_size == 1, "context parallelism is not built"
        assert config.window_size is None, "sliding-window attention is not built"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads, d], key and value [T, kv_heads, d] -> [T, heads * d]."""
        assert packed_seq_params is not None, "training tensors are packed"
        borders = packed_seq_params.cu_seqlens_q.tolist()
        outputs, start = [], 0
        for length, run in groupby(stop - begin for begin, stop in pairwise(borders)):
            stop = start + length * len(list(run))
            q, k, v = (
                x[start:stop].view(-1, length, x.shape[-2], x.shape[-1]).transpose(1, 2) for x in (query, key, value)
            )
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(attended.transpose(1, 2).reshape(stop - start, -1))
            start = stop
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
