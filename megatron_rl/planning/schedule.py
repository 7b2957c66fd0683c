"""How a step is cut into updates and micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import RolloutTrainerConfig
from megatron_rl.data.planner import plan_step
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.memory import longest_sample, samples_per_update


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Of one step. `bubble` is the share of a pipeline's time in which a stage waits."""

    updates: int
    samples: int  # of an update, over all ranks
    micro_batches: int  # of an update, on each rank
    tokens: tuple[int, int]  # of the emptiest and of the fullest one that holds a sample
    bubble: float


def longest_step(config: Config) -> list[int]:
    """Lengths of an update's samples, all at their longest."""
    return [longest_sample(config)] * samples_per_update(config)


def schedule(config: Config, layout: Layout, lengths: Sequence[int]) -> Schedule:
    """Of samples of these lengths, the first of a step. Bubble: (pp - 1) / (pp - 1 + vpp micro-batches)."""
    lengths = lengths[: samples_per_update(config)]
    plan = plan_step(
        lengths,
        dp_size=layout.dp,
        max_tokens=config.train.max_tokens_per_micro_batch,
        min_micro_batches=layout.pp,
        multiple_of=layout.pp if layout.vpp > 1 else 1,
    )
    tokens = [sum(lengths[i] for i in indices) for rank in plan.micro_batches for indices in rank if indices]
    updates = 1
    if isinstance(config, RolloutTrainerConfig):
        updates = config.train.mini_batches_per_step * config.train.epochs_per_step
    waiting = layout.pp - 1
    return Schedule(
        updates=updates,
        samples=len(lengths),
        micro_batches=plan.num_micro_batches,
        tokens=(min(tokens), max(tokens)),
        bubble=waiting / (waiting + layout.vpp * plan.num_micro_batches),
    )
