"""Norm and activation for the layer spec without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CACHED_ROWS = 256  # of the MLP's inside, whose gradients a core's cache holds


class RMSNorm(torch.nn.RMSNorm):
    """x w / sqrt(mean(x^2) + eps) over the last axis, computed in float32 or wider, under sequence parallelism as well.

    megatron-core's own wrapper asserts that there is none (transformer/torch_norm.py). Each rank then sees a part of
    the tokens; the mark makes `finalize_model_grads` add up the weight's gradient over the ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., H] w [H] r with r = (mean(x^2) + eps)^(-1/2), rounded once.

    Kept for the backward pass are x and r. torch's norm keeps x r too, in float32, and goes through it term by term,
    which on a CPU takes two to three times as long. With g the upstream gradient and n = x r

        dL/dw = sum over tokens of g n,    dL/dx = r (g w - n mean(g w n)).
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = x.to(wide, copy=True)
        rms = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
        scale = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x * scale, weight.to(scale.dtype)
        product = grad * normed
        rows = product.flatten(0, -2)
        grad_weight = rows.sum(0)
        mean = torch.mv(rows, wide).div_(-x.shape[-1]).view_as(scale)
        grad_x = torch.mul(grad, wide, out=product).addcmul_(normed, mean).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class SwiGLU:
    """silu(gate) up of [..., gate | up], as an activation of megatron-core's MLP.

    Kept for the backward pass is the input alone. megatron-core's own keeps silu(gate) and a copy of `up` too, to which
    it has added an offset of zero.
    """

    def __init__(self, config: Any) -> None:
        pass

    def __call__(self, projected: Tensor) -> Tensor:
        return _SwiGLU.apply(projected)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        gate, up = projected.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (projected,) = ctx.saved_tensors
        result = torch.empty_like(projected, memory_format=torch.contiguous_format)
        parts = (x.flatten(0, -2).split(CACHED_ROWS) for x in (projected, grad, result))
        for (gate, up), upstream, (of_gate, of_up) in ((p.chunk(2, -1), g, r.chunk(2, -1)) for p, g, r in zip(*parts)):
            torch.ops.aten.silu_backward.grad_input(upstream * up, gate, grad_input=of_gate)
            torch.mul(upstream, F.silu(gate), out=of_up)
        return result
