"""The rollout batch of a step: answer, judge, and where groups teach nothing, ask again."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, cast

import torch
from torch import Tensor

from megatron_rl.config.schema import Advantage, PolicyConfig, RolloutTrainerConfig
from megatron_rl.data.samples import Sample, from_example
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.rollout.engine import Drawing, OverlappingEngine, Sampling
from megatron_rl.trainers.evaluate import TRAINING
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.types import Prompt, Rollout, RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker


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
        groups = parts.generate(prompts, sampling)
    with timer("reward"):
        return score(parts.pool, groups)


class RolloutBatches:
    """The rollout batch of each step: weights to the engine, answers, rewards; again where groups teach nothing.

    With `rollout.vllm.server.ahead` the engine draws the next step's answers as soon as it has this step's weights,
    while the step learns from answers that were drawn with the weights before.
    """

    def __init__(self, config: PolicyConfig, actor: ModelWorker, parts: Parts, source: PromptSource) -> None:
        self.config, self.actor, self.parts, self.source = config, actor, parts, source
        self.next: Drawing | None = None

    def __call__(self, step: int, timer: Timer) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The scored groups, and how they came about. Collective."""
        config = self.config
        first, figures = self._first(step, timer)
        size, most = config.train.batch_size, config.algorithm.max_rollout_batches
        assert most is not None
        drawn: list[RolloutGroup] = []

        def draw(number: int) -> list[RolloutGroup]:
            groups = first if number == 0 else self._answers(step, number, timer)
            with timer("reward"):
                groups = score(self.parts.pool, groups)
            drawn.extend(groups)
            return groups

        groups, calls = refill(draw, size, most)
        figures["rollout/batches"] = float(calls)
        if config.rollout.group_size > 1:
            figures["rollout/silent_groups"] = sum(map(is_silent, drawn)) / len(drawn)
        return groups, figures

    def _first(self, step: int, timer: Timer) -> tuple[list[RolloutGroup], dict[str, float]]:
        """The step's own answers, with the weights on their way or, drawn ahead, before them."""
        groups: list[RolloutGroup] | None = None
        figures: dict[str, float] = {}
        if self.next is not None:
            with timer("gen"):
                groups = self.next.groups()
            figures["timing_s/gen_ahead"] = self.next.seconds
            self.next = None
        with timer("sync"):
            figures |= self.parts.push(self.actor)
        if groups is None:
            groups = self._answers(step, 0, timer)
        if self.config.rollout.vllm.server.ahead:
            figures["rollout/staleness"] = fmean(
                self.actor.version - rollout.policy_version for group in groups for rollout in group.rollouts
            )
            if step < self.config.train.steps:
                engine = cast(OverlappingEngine, self.parts.engine)
                with timer("gen"):
                    self.next = engine.start(self._prompts(), sampling(self.config, step + 1, 0))
        return groups, figures

    def _prompts(self) -> list[Prompt]:
        return self.source.next(self.config.train.batch_size)

    def _answers(self, step: int, number: int, timer: Timer) -> list[RolloutGroup]:
        with timer("gen"):
            return self.parts.generate(self._prompts(), sampling(self.config, step, number))

    def state(self) -> dict[str, Any]:
        """The place in the data, and what was drawn ahead. Collective."""
        ahead = None if self.next is None else [asdict(r) for group in self.next.groups() for r in group.rollouts]
        return {"source": self.source.state_dict(), "ahead": ahead}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])
        ahead = state.get("ahead")
        self.next = None if ahead is None else Drawn(self._saved_groups(ahead))

    def _saved_groups(self, saved: Sequence[dict[str, Any]]) -> list[RolloutGroup]:
        size = self.config.rollout.group_size
        rollouts = [_rollout(fields) for fields in saved]
        groups = [tuple(rollouts[start : start + size]) for start in range(0, len(rollouts), size)]
        return [RolloutGroup(prompt=self.source.at(group[0].prompt_index), rollouts=group) for group in groups]


def _rollout(saved: dict[str, Any]) -> Rollout:
    """JSON has lists where a record has tuples."""
    tuples = {name: tuple(saved[name]) for name in ("token_ids", "log_probs", "log_kept_mass")}
    later = tuple((first, version) for first, version in saved["later_versions"])
    return Rollout(**(saved | tuples | {"later_versions": later}))


class Drawn:
    """Answers that a checkpoint brought."""

    seconds = 0.0

    def __init__(self, groups: list[RolloutGroup]) -> None:
        self._groups = groups

    def groups(self) -> list[RolloutGroup]:
        return self._groups


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
