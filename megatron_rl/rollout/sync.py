"""The stair on which weights go from the trainer to the engine, and the probe that says whether they arrived."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from megatron_rl.metrics.rules import RULES
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.engine import Engine
from megatron_rl.types import Rollout, RunError

SHOWN_TENSORS = 3


class ParityError(RunError):
    """Engine and trainer disagree about the policy."""


class WeightSyncError(RunError):
    """An engine does not hold the weights that it was sent."""


def push(
    named_weights: Callable[[], Iterator[tuple[str, Tensor]]], engine: Engine, version: int, *, check: bool = True
) -> dict[str, float]:
    """Gives the engine the weights of `version`, unless it has them, and checks that every rank's engine took them.

    Every tensor's checksum is noted on its way to the engine, and taken again of the engine's own copy. Collective.
    """
    if engine.version != version:
        sent: dict[str, int] = {}
        noting = check and engine.takes
        engine.load_weights(_noting(named_weights(), engine, sent) if noting else named_weights(), version)
        held = engine.checksums(sent)
        # On all ranks alike: one that stopped by itself would leave the others waiting.
        wrong = gather_over_world([name for name in sent if held[name] != sent[name]])
        check_weights(wrong, max(gather_over_world([len(sent)])), version)
    return {"sync/wrong_tensors": 0.0} if check else {}


def _noting(
    weights: Iterator[tuple[str, Tensor]], engine: Engine, sent: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The weights; the checksums that the engine must find, in its precision and where it takes them, go to `sent`."""
    for name, tensor in weights:
        there = tensor.to(engine.device)
        sent[name] = checksum(there.to(engine.dtype))
        yield name, there


def check_weights(wrong: Sequence[str], tensors: int, version: int) -> None:
    """Stops the run where a tensor arrived as another: its rollouts would be another policy's."""
    if wrong:
        names = sorted(set(wrong))
        more = f" and {len(names) - SHOWN_TENSORS} more" if len(names) > SHOWN_TENSORS else ""
        rule = RULES["weight_checksum"]
        raise WeightSyncError(
            f"after the sync of policy version {version} {len(names)} of {tensors} tensors in the engine are not what "
            f"the trainer sent: {', '.join(names[:SHOWN_TENSORS])}{more}. Likely cause: {rule.cause}. To try: "
            f"{rule.remedy}"
        )


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
        rule = RULES["parity"]
        raise ParityError(
            f"the engine's log-probabilities differ from the trainer's by up to {largest:.2e} (mean {mean:.2e}) at "
            f"policy version {version}; allowed is {rule.option}={tolerance:g}. Likely cause: {rule.cause}. To try: "
            f"{rule.remedy}"
        )
