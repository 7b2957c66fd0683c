"""The stair on which weights go from the trainer to the engine, and the probe that says whether they arrived."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from megatron_rl.rollout.engine import Engine
from megatron_rl.types import Rollout


class ParityError(RuntimeError):
    """Engine and trainer disagree about the policy."""


def push(named_weights: Callable[[], Iterator[tuple[str, Tensor]]], engine: Engine, version: int) -> None:
    """Gives the engine the weights of `version`, unless it has them."""
    if engine.version != version:
        engine.load_weights(named_weights(), version)


def parity_gap(rollouts: Sequence[Rollout], trainer_log_probs: Mapping[int, Tensor]) -> tuple[float, float]:
    """Largest and mean |difference| between the engine's and the trainer's log-probabilities.

    `trainer_log_probs[i]` belongs to `rollouts[i]`, under the whole softmax at the sampling temperature.
    """
    gaps = [
        abs(drawn + kept - trained)
        for place, rollout in enumerate(rollouts)
        for drawn, kept, trained in zip(rollout.log_probs, rollout.log_kept_mass, trainer_log_probs[place].tolist())
    ]
    return (max(gaps), sum(gaps) / len(gaps)) if gaps else (0.0, 0.0)


def check_parity(largest: float, mean: float, tolerance: float, version: int) -> None:
    """Stops the run where the two disagree: every importance ratio would be wrong."""
    if largest > tolerance:
        raise ParityError(
            f"the engine's log-probabilities differ from the trainer's by up to {largest:.2e} (mean {mean:.2e}) at "
            f"policy version {version}; allowed is rollout.parity_tolerance={tolerance:g}. A large gap on every token "
            "means that the engine did not get the trainer's weights, another temperature, or another rotary "
            "embedding; a small one means lower precision: raise the tolerance for bfloat16"
        )
