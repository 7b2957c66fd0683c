"""megatron-core's pipeline schedules behind one call."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_rl.metrics.progress import tick
from megatron_rl.parallel.device import ON_CPU
from megatron_rl.parallel.mesh import Mesh

# isort: split
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

LossFunction = Callable[[Tensor], tuple[Tensor, Any]]
"""From the last stage's output to (scalar loss, whatever the caller wants back)."""

StepFunction = Callable[[Any, Any], tuple[Tensor, LossFunction]]
"""From (model chunk, micro-batch) to the chunk's output and the loss function to apply on the last stage."""


def run_schedule(
    chunks: Sequence[Any],
    micro_batches: Sequence[Any],
    step: StepFunction,
    *,
    mesh: Mesh,
    forward_only: bool,
    reducing: AbstractContextManager[None] | None = None,
) -> list[Any]:
    """Runs every micro-batch through the pipeline, backward too unless `forward_only`.

    Returns what the loss function gave beside the loss, one entry per micro-batch, on the last stage; elsewhere an
    empty list. After a backward pass the gradients are reduced over every axis, inside `reducing`.
    """
    config = get_model_config(chunks[0])
    if ON_CPU and config.deallocate_pipeline_outputs:
        raise ValueError("deallocate_pipeline_outputs gives wrong gradients on gloo and must stay off")

    def finalize(model: list[Any], num_tokens: Tensor | None = None, **options: Any) -> None:
        """The token count is withheld: weights already sum to one, so nothing divides here."""
        with reducing or nullcontext():
            finalize_model_grads(model, None, **options)

    config.finalize_model_grads_func = finalize
    if not forward_only:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def forward_step(data: Any, model: Any, *unused: Any) -> tuple[Tensor, Callable[..., Any]]:
        tick()
        output, loss_function = step(model, next(data))

        def with_count(last_output: Tensor) -> tuple[Tensor, Tensor, Any]:
            loss, result = loss_function(last_output)
            return loss, torch.zeros((), dtype=torch.int, device=loss.device), result

        return output, with_count

    data = [iter(micro_batches) for _ in chunks]
    longest = max((batch.tokens.shape[1] for batch in micro_batches if batch is not None), default=1)
    with torch.no_grad() if forward_only else nullcontext():
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=longest,
            micro_batch_size=1,
            forward_only=forward_only,
        )
