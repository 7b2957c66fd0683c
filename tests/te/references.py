"""What Transformer Engine's modules compute, in torch, behind the signatures of the installed version.

A call that does not bind to the real `forward` raises TypeError, as it would on a GPU.
"""

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Compute = Callable[[Any, dict[str, Any]], Any]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def rms_norm(module: Any, given: dict[str, Any]) -> Tensor:
    return norm(given["input"], module.weight, module.eps)


def _product(module: Any, x: Tensor) -> Any:
    """x weight^T, with the exchange that the module does itself; the bias is added, or returned beside it."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    alone = module.tp_size == 1
    group = None if alone else module.tp_group
    if module.parallel_mode == "column" and not alone:
        x = (
            gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)
            if module.sequence_parallel
            else copy_to_tensor_model_parallel_region(x, group=group)
        )
    y = F.linear(x, module.weight)
    if module.parallel_mode == "row" and not alone:
        y = (
            reduce_scatter_to_sequence_parallel_region(y, group=group)
            if module.sequence_parallel
            else reduce_from_tensor_model_parallel_region(y, group=group)
        )
    bias = module.bias if module.bias is not None and module.bias.numel() else None
    if module.return_bias:
        return y, bias
    return y if bias is None else y + bias


def linear(module: Any, given: dict[str, Any]) -> Any:
    return _product(module, given["inp"])


def layer_norm_linear(module: Any, given: dict[str, Any]) -> Any:
    assert module.normalization == "RMSNorm" and not module.zero_centered_gamma
    return _product(module, norm(given["inp"], module.layer_norm_weight, module.eps))


def grouped_linear(module: Any, given: dict[str, Any]) -> Any:
    """Expert by expert; tensor parallelism of experts is the caller's."""
    assert module.parallel_mode is None or module.tp_size == 1
    rows = given["inp"].split([int(n) for n in given["m_splits"]])
    y = torch.cat([F.linear(x, getattr(module, f"weight{number}")) for number, x in enumerate(rows)])
    return (y, None) if module.return_bias else y


def dot_product_attention(module: Any, given: dict[str, Any]) -> Tensor:
    """Causal inside each packed sequence: [T, heads, d] to [T, heads d]."""
    assert (given["qkv_format"], given["attn_mask_type"]) == ("thd", "padding_causal")
    assert given["core_attention_bias"] is None and not module.attention_dropout
    borders = given["cu_seqlens_q"].tolist()
    assert borders == given["cu_seqlens_kv"].tolist()
    assert given["max_seqlen_q"] >= max(stop - start for start, stop in pairwise(borders))
    scale = module.unfused_attention.softmax_scale
    tensors = [given[name] for name in ("query_layer", "key_layer", "value_layer")]
    found = []
    for start, stop in pairwise(borders):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in tensors)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scale)
        found.append(y[0].transpose(0, 1).flatten(1))
    return torch.cat(found)


REFERENCES: dict[str, Compute] = {
    "RMSNorm": rms_norm,
    "Linear": linear,
    "LayerNormLinear": layer_norm_linear,
    "GroupedLinear": grouped_linear,
    "DotProductAttention": dot_product_attention,
}


def behind(real: Callable[..., Any], compute: Compute) -> Callable[..., Any]:
    """`compute` of the arguments of the real function, by name and with its defaults."""
    signature = inspect.signature(real)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        return compute(self, bound.arguments)

    forward.real, forward.__signature__ = real, signature  # type: ignore[attr-defined]
    return forward


def install(library: Any) -> None:
    """Into transformer_engine.pytorch."""
    for name, compute in REFERENCES.items():
        module = getattr(library, name)
        module.forward = behind(module.forward, compute)
