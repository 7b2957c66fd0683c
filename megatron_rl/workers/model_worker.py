"""One Megatron model under training: forward_backward, step, saved state."""

import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from megatron_rl.config.schema import ModelConfig, OptimConfig
from megatron_rl.data.collate import MicroBatch
from megatron_rl.data.planner import StepPlan
from megatron_rl.data.samples import Sample
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Metrics, merge
from megatron_rl.models.build import LanguageModel
from megatron_rl.models.exchange import export_weights
from megatron_rl.parallel.collect import any_rank, reduce_metrics
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.parallel.schedule import LossFunction, run_schedule
from megatron_rl.workers import adam_state
from megatron_rl.workers.objective import Objective
from megatron_rl.workers.sharded_model import DTYPES, ShardedModel

# isort: split
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

# Of a group of the optimizer's parameters, what the config says.
GROUP_OPTIONS = ("max_lr", "min_lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step. `applied` is false when a gradient was not finite and the step was skipped."""

    grad_norm: float
    lr: float
    applied: bool


class ModelWorker(ShardedModel):
    """The model with megatron-core's DDP and distributed optimizer. `version` counts the steps that were applied.

    `timer` measures the parts of an update; a run gives its workers its own.
    """

    def __init__(self, model: ModelConfig, optim: OptimConfig, mesh: Mesh, *, total_steps: int) -> None:
        super().__init__(model, mesh)
        self.chunks = [self._wrap(index, chunk) for index, chunk in enumerate(self.models)]
        self.optimizer = get_megatron_optimizer(_optimizer_config(optim, DTYPES[model.dtype.value]), self.chunks)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = _scheduler(self.optimizer, optim, total_steps)
        self.clip_grad = optim.clip_grad
        self.loss_is_finite = True
        self.timer = Timer()

    def _wrap(self, index: int, chunk: LanguageModel) -> DistributedDataParallel:
        """Gradients are kept and reduced in fp32; the distributed optimizer is on at every size, DP = 1 too."""
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        # Of an interleaved pipeline only the first chunk's buckets overlap with the backward pass.
        return DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)

    def state_bytes(self) -> int:
        """What this rank keeps between steps: weights, float32 gradients, and its share of Adam's state.

        Adam keeps two float32 moments and, where the weights are not float32 themselves, a float32 master copy.
        """
        parameters = [parameter for model in self.models for parameter in model.parameters()]
        gradients = sum(4 * parameter.numel() for parameter in parameters)
        copies = 2 if self.models[0].config.params_dtype == torch.float32 else 3
        shares = sum(
            copies * buffer.grad_data.nbytes // buffer.data_parallel_group.size() for buffer in self._buffers()
        )
        return sum(parameter.nbytes for parameter in parameters) + gradients + shares

    def forward_backward(self, samples: Sequence[Sample], plan: StepPlan, objective: Objective) -> Metrics:
        """Accumulates the gradient of `objective` over one mini-batch; returns its metrics, reduced over all ranks.

        `samples` is the whole mini-batch, on every rank.
        """
        with self.timer("forward_backward"):
            return self._forward_backward(samples, plan, objective)

    def _forward_backward(self, samples: Sequence[Sample], plan: StepPlan, objective: Objective) -> Metrics:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.loss_is_finite = True

        def step(chunk: Any, batch: MicroBatch) -> tuple[Tensor, LossFunction]:
            def loss(hidden: Tensor) -> tuple[Tensor, Metrics]:
                outcome = objective(self._loss_tokens(hidden, batch))
                self.loss_is_finite &= math.isfinite(outcome.loss.detach())
                return outcome

            return self._forward(chunk, batch), loss

        batches = self._micro_batches(samples, plan, objective.field_names)
        reducing = self.timer("reduce_gradients")
        results = run_schedule(self.chunks, batches, step, mesh=self.mesh, forward_only=False, reducing=reducing)
        total: Metrics | None = None
        for metrics in results:
            total = metrics if total is None else merge(total, metrics)
        return reduce_metrics(total, self.mesh)

    def step(self) -> StepResult:
        """Clips, updates the weights, advances the learning rate; or nothing of it, on every rank.

        Without a loss scaler megatron-core does not look at what it clips: a NaN or an infinite norm would reach every
        weight and moment. So nothing is asked of it where any rank's loss or gradients are not finite.
        """
        with self.timer("optimizer"):
            return self._step()

    def _step(self) -> StepResult:
        lr = self.lr
        if any_rank(not (self.loss_is_finite and self._gradients_are_finite())):
            return StepResult(math.nan, lr, applied=False)
        applied, grad_norm, _ = self.optimizer.step()
        if applied:
            self.scheduler.step(increment=1)
            self.version += 1
        return StepResult(float(grad_norm or 0.0), lr, bool(applied))

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def named_hf_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients under the weights' names, summed over every axis; collective."""
        self._complete_gradients()
        return export_weights(self.models, self.mesh, lambda parameter: _main_grad(parameter))

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """Parameters and optimizer as megatron-core's sharded tensors, and the schedule."""
        weights = self.sharded_weights()
        return {
            **weights,
            "optimizer": adam_state.sharded_state(self.optimizer, weights, loading=loading),
            "scheduler": self.scheduler.state_dict(),
            "version": self.version,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        # Rates and betas are the config's to say, also where the checkpoint was written with others.
        options = [{k: v for k, v in group.items() if k in GROUP_OPTIONS} for group in self.optimizer.param_groups]
        adam_state.load_state(self.optimizer, state["optimizer"])
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        # megatron-core adds the saved count to the present one.
        self.scheduler.num_steps = 0
        self.scheduler.load_state_dict(state["scheduler"])

    def give_back(self) -> None:
        """Frees the gradient buffers between two steps, and moves Adam's state off a GPU.

        Adam's stays with float32 weights: there it has views of them, which megatron-core would cut off.
        """
        for chunk in self.chunks:
            chunk.offload_grad_buffers()
        if self.models[0].config.params_dtype != torch.float32:
            self.optimizer.offload_to_cpu()

    def take_back(self) -> None:
        """What `give_back` gave; gradients are zero."""
        for chunk in self.chunks:
            chunk.restore_grad_buffers()
        if self.models[0].config.params_dtype != torch.float32:
            self.optimizer.restore_from_cpu()

    def close(self) -> None:
        """Frees the buffers and process groups of a worker that the process is to outlive.

        Megatron's DDP is held by the hooks on its own parameters, in a circle that Python cannot see.
        """
        for chunk in self.chunks:
            vars(chunk).clear()
        self.chunks = []
        gc.collect()

    def _gradients_are_finite(self) -> bool:
        """Of all gradients on this rank, those that the optimizer's norm leaves out as duplicates too."""
        norms = [buffer.grad_data.norm() for buffer in self._buffers()]
        return bool(torch.stack(norms).isfinite().all())

    def _complete_gradients(self) -> None:
        """After reduce-scatter each data-parallel rank holds its shard of the buffer; this fills in the rest."""
        for buffer in self._buffers():
            group = buffer.data_parallel_group
            for bucket in buffer.buckets if group.size() > 1 else ():
                shard = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, shard, group=group)

    def _buffers(self) -> Iterator[Any]:
        """The gradient buffers: experts have their own, for they are copied on other ranks than the rest."""
        for chunk in self.chunks:
            yield from chunk.buffers
            yield from chunk.expert_parallel_buffers


def _main_grad(parameter: Parameter) -> Tensor:
    return parameter.main_grad  # type: ignore[attr-defined]


def _optimizer_config(optim: OptimConfig, dtype: torch.dtype) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=True,
    )


def _scheduler(optimizer: Any, optim: OptimConfig, total_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine to `min_lr`, in optimizer steps."""
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(total_steps, optim.warmup_steps + 1),
        lr_decay_style=optim.schedule.value,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    # megatron-core gives the first step of a warm-up a rate of zero; counting from one does not waste it.
    scheduler.step(increment=1)
    return scheduler
