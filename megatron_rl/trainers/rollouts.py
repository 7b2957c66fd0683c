"""The rollout batch of a step: answer, judge, and where groups teach nothing, ask again."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_rl.config.schema import Advantage, PolicyConfig, RolloutTrainerConfig
from megatron_rl.data.samples import Sample, from_example
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.rollout.engine import Sampling
from megatron_rl.trainers.evaluate import TRAINING
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.types import Prompt, RolloutGroup


def is_silent(group: RolloutGroup) -> bool:
    """All judged rewards are equal, or there are fewer than two: every advantage is zero."""
    return len({reward.value for reward in group.rewards if reward.reason is None}) < 2


def refill(draw: Callable[[int], Sequence[RolloutGroup]], size: int, most: int) -> tuple[list[RolloutGroup], int]:
    """`size` groups that teach something, from at most `most` calls of `draw(number)`; and how many calls it took.

    The dynamic sampling of DAPO (Yu et al., arXiv 2503.14476). Where they are not enough, silent groups fill up, which
    teach nothing; where there are more, the last are dropped. With `most` 1 the batch is what was drawn.
    """
    telling: list[RolloutGroup] = []
    silent: list[RolloutGroup] = []
    calls = 0
    while calls < most and len(telling) < size:
        for group in draw(calls):
            (silent if is_silent(group) and most > 1 else telling).append(group)
        calls += 1
    return (telling + silent)[:size], calls


def answer(parts: Parts, prompts: Sequence[Prompt], sampling: Sampling, timer: Timer) -> list[RolloutGroup]:
    """Scored answers to the prompts. Collective."""
    with timer("gen"):
        groups = parts.engine.generate(prompts, sampling)
    with timer("reward"):
        return score(parts.pool, groups)


def rollout_batch(
    config: PolicyConfig, parts: Parts, source: PromptSource, step: int, timer: Timer
) -> tuple[list[RolloutGroup], dict[str, float]]:
    """The scored groups of one step, and how they came about. Collective."""
    size, most = config.train.batch_size, config.algorithm.max_rollout_batches
    assert most is not None
    drawn: list[RolloutGroup] = []

    def draw(number: int) -> list[RolloutGroup]:
        groups = answer(parts, source.next(size), sampling(config, step, number), timer)
        drawn.extend(groups)
        return groups

    groups, calls = refill(draw, size, most)
    figures = {"rollout/batches": float(calls)}
    if config.rollout.group_size > 1:
        figures["rollout/silent_groups"] = sum(map(is_silent, drawn)) / len(drawn)
    return groups, figures


def greedy_rewards(config: PolicyConfig, parts: Parts, groups: Sequence[RolloutGroup], timer: Timer) -> Tensor | None:
    """ReMax's baselines [n] float64: the reward of each prompt's greedy answer, once per rollout. Collective."""
    if config.algorithm.advantage is not Advantage.remax:
        return None
    once = replace(sampling(config, 0, 0), group_size=1, temperature=0.0)
    answers = answer(parts, [group.prompt for group in groups], once, timer)
    values = [answer.rewards[0].value for answer, group in zip(answers, groups) for _ in group.rewards]
    return torch.tensor(values, dtype=torch.float64)


def sampling(config: RolloutTrainerConfig, step: int, number: int) -> Sampling:
    """How the `number`-th batch of a step is drawn: each has random numbers of its own."""
    rollout = config.rollout
    return Sampling(
        group_size=rollout.group_size,
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=tuple(rollout.stop),
        seed=config.train.seed,
        stream=(TRAINING, step, number) if number else (TRAINING, step),
    )


def to_samples(groups: Sequence[RolloutGroup], *, drop_truncated: bool = False) -> list[Sample]:
    """Rollouts in order, numbered from 0. A response that could not be judged bears no loss.

    Nor does one that was cut off at the limit with `drop_truncated` (DAPO's overlong filtering); its reward still
    counts in its group.
    """
    pairs = [(group, i) for group in groups for i in range(len(group.rollouts))]
    samples = []
    for number, (group, i) in enumerate(pairs):
        sample = from_example(number, group.prompt.token_ids, group.rollouts[i].token_ids)
        dropped = drop_truncated and group.rollouts[i].finish_reason == "length"
        samples.append(sample.without_loss() if dropped or group.rewards[i].reason is not None else sample)
    return samples
