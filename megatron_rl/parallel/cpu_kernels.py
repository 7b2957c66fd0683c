"""In torch, for the CPU: functions that megatron-core takes from CUDA libraries and calls where its config says so."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_rl.ops.products import add_mm_


def add_weight_gradient(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad [out, in] += grad_output [T, out]^T input [T, in]: apex's `wgrad_gemm_accum_fp32`."""
    add_mm_(main_grad, grad_output.t(), input)


def rotate_packed(t: Tensor, cu_seqlens: Tensor, freqs: Tensor, *, cp_size: int, cp_rank: int) -> Tensor:
    """Rotary embedding of packed sequences: Transformer Engine's `fused_apply_rotary_pos_emb_thd`.

    t [T, heads, d]; `freqs` [longest, 1, 1, d] are angles by position, those of the first half of d repeated; of each
    pair (x_i, x_{i + d/2}), turned by its angle a, it returns (x cos a - y sin a, y cos a + x sin a) as a new tensor.
    """
    assert cp_size == 1, "context parallelism is not built"
    return _Rotation.apply(t, *_cos_sin(cu_seqlens, freqs, t.dtype))


@lru_cache(maxsize=1)
def _cos_sin(cu_seqlens: Tensor, freqs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each token's angles, [T, 1, d] and [T, 1, d / 2]; all layers of a micro-batch ask for the same."""
    lengths = cu_seqlens.diff()
    positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(lengths)
    angles = freqs[positions, 0]
    return angles.cos().to(dtype), angles[..., : angles.shape[-1] // 2].sin().to(dtype)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(t, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(t: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    rotated = t * cos
    (x, y), (new_x, new_y) = t.chunk(2, -1), rotated.chunk(2, -1)
    new_x.addcmul_(y, sin, value=-sign)
    new_y.addcmul_(x, sin, value=sign)
    return rotated
