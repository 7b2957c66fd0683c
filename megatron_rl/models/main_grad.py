"""Gradients that an operator adds to megatron-core's float32 `main_grad` itself, and the protocol around it.

megatron-core's DDP adds a parameter's gradient to its `main_grad` in a hook, unless `grad_added_to_main_grad` says that
this was done. The hook has to run all the same, for it counts the gradients of a bucket, so that the parameter is given
a gradient: a sparse one without entries, which takes no memory. Where the embedding is the same parameter
(`zero_out_wgrad`), the hook adds what autograd has, which is the embedding's gradient plus this one. On another
pipeline stage the head's copy is a parameter of its own, and megatron-core adds up both `main_grad`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter


def with_main_grad(parameter: Parameter) -> tuple[Tensor, Tensor | None]:
    """The parameter for one operator, and the tensor to which that operator adds the parameter's gradient.

    None where there is no such tensor, or no gradient is taken: the operator is then to return what gradient there is.
    """
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is None or not parameter.requires_grad or not torch.is_grad_enabled():
        return parameter, None
    return _Added.apply(parameter), main_grad


class _Added(torch.autograd.Function):
    """The parameter; behind the operator it tells megatron-core that the gradient was added."""

    @staticmethod
    def forward(ctx: Any, parameter: Parameter) -> Tensor:
        ctx.parameter = parameter
        ctx.set_materialize_grads(False)
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> Tensor:
        assert grad is None, "the operator adds the gradient itself"
        parameter = ctx.parameter
        parameter.grad_added_to_main_grad = True
        nowhere = torch.empty(1, 0, dtype=torch.int64, device=parameter.device)
        nothing = parameter.new_empty(0, *parameter.shape[1:])
        return torch.sparse_coo_tensor(nowhere, nothing, parameter.shape, check_invariants=True)
