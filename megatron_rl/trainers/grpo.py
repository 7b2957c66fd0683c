"""Group-relative policy optimisation: answer, judge, compare within the group, update."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_rl.algorithms import advantages
from megatron_rl.config.schema import Algorithm, GrpoConfig
from megatron_rl.data.samples import Sample, from_rollout, weighed
from megatron_rl.data.sources import PromptSource
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import Max, Mean, Metrics, Sum, merge
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.sync import check_parity, parity_gap, push
from megatron_rl.trainers.data import train_prompts
from megatron_rl.trainers.evaluate import TRAINING
from megatron_rl.trainers.parts import Parts, score
from megatron_rl.trainers.rollout_metrics import rollout_metrics
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.objective import PolicyGradient


class GrpoTrainer:
    """One rollout batch, `updates_per_step` updates."""

    def __init__(self, config: GrpoConfig, parts: Parts, source: PromptSource) -> None:
        self.config, self.parts, self.source = config, parts, source
        self.engine, self.pool = parts.engine, parts.pool
        self.objective = policy_objective(config)
        self.probed = False

    def step(self, step: int, timer: Timer) -> dict[str, float]:
        config, actor, engine = self.config, self.parts.actor, self.engine
        with timer("sync"):
            push(actor.named_hf_weights, engine, actor.version)
        with timer("gen"):
            groups = engine.generate(self.source.next(config.train.batch_size), self._sampling(step))
        with timer("reward"):
            groups = score(self.pool, groups)
        with timer("adv"):
            values = group_advantages(groups, normalize_by_std=bool(config.algorithm.normalize_by_std))
            samples = to_samples(groups, values)
        probe = self._is_probe(step)
        metrics = rollout_metrics(groups, values)
        if probe or not self.objective.on_policy:
            with timer("old_log_prob"):
                log_probs = actor.log_probs(samples, self._plan(samples), config.rollout.temperature)
            samples = [sample.with_loss_field("old_log_probs", log_probs[sample.id]) for sample in samples]
            if probe:
                metrics |= self._check_parity(groups, log_probs)
        with timer("update_actor"):
            metrics |= self._update(samples)
        return metrics

    def _update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Mini-batches of whole groups, in order. A loss is logged as its mean over the updates."""
        actor, algorithm = self.parts.actor, self.config.algorithm
        size = len(samples) // self.config.train.updates_per_step
        total: Metrics = {}
        for start in range(0, len(samples), size):
            mini_batch = weighed(
                samples[start : start + size], str(algorithm.aggregation), horizon=self.config.rollout.max_new_tokens
            )
            stats = actor.forward_backward(mini_batch, self._plan(mini_batch), self.objective)
            update = actor.step()
            per_update: Metrics = {name: Mean(v.value, 1) if isinstance(v, Sum) else v for name, v in stats.items()}
            per_update |= {
                "actor/grad_norm": Max(update.grad_norm),
                "actor/lr": Mean(update.lr, 1),
                "actor/skipped": Sum(float(not update.applied)),
            }
            total = merge(total, per_update) if total else per_update
        return {name: value.result() for name, value in total.items()}

    def _plan(self, samples: Sequence[Sample]) -> Any:
        return self.parts.actor.plan(samples, self.config.train.max_tokens_per_micro_batch)

    def _sampling(self, step: int) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            group_size=rollout.group_size,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            seed=self.config.train.seed,
            stream=(TRAINING, step),
        )

    def _is_probe(self, step: int) -> bool:
        """After the first weight update of this process, and every so many steps."""
        every = self.config.rollout.parity_every
        due = not self.probed or (every > 0 and step % every == 0)
        self.probed = True
        return due

    def _check_parity(self, groups: Sequence[RolloutGroup], log_probs: dict[int, Tensor]) -> dict[str, float]:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        largest, mean = parity_gap(rollouts, log_probs)
        tolerance = self.config.rollout.parity_tolerance
        assert tolerance is not None
        check_parity(largest, mean, tolerance, self.parts.actor.version)
        return {"rollout/log_prob_gap_max": largest, "rollout/log_prob_gap_mean": mean}

    def state(self) -> dict[str, Any]:
        return {"source": self.source.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.source.load_state_dict(state["source"])


def group_advantages(groups: Sequence[RolloutGroup], *, normalize_by_std: bool) -> Tensor:
    """One advantage per rollout [n] float64, groups one after the other."""
    rewards = torch.tensor([reward.value for group in groups for reward in group.rewards], dtype=torch.float64)
    group_ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.rewards])
    return advantages.grpo(rewards, group_ids, normalize_by_std=normalize_by_std)


def to_samples(groups: Sequence[RolloutGroup], values: Tensor) -> list[Sample]:
    """Rollouts in order, numbered from 0. A response that could not be judged bears no loss."""
    pairs = [(group, i) for group in groups for i in range(len(group.rollouts))]
    samples = []
    for number, ((group, i), value) in enumerate(zip(pairs, values.tolist())):
        sample = from_rollout(number, group.prompt.token_ids, group.rollouts[i], value)
        samples.append(sample if group.rewards[i].reason is None else sample.without_loss())
    return samples


def policy_objective(config: GrpoConfig) -> PolicyGradient:
    """The named algorithm with its options filled in."""
    algorithm = config.algorithm
    assert algorithm.clip_low is not None and algorithm.clip_high is not None
    name: Literal["grpo", "gspo"] = "gspo" if algorithm.name is Algorithm.gspo else "grpo"
    return PolicyGradient(
        name=name,
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip or None,
        entropy_coeff=algorithm.entropy_coeff,
        temperature=config.rollout.temperature,
        on_policy=config.train.updates_per_step == 1,
    )


def build(config: GrpoConfig, mesh: Mesh) -> GrpoTrainer:
    """The trainer on this rank."""
    parts = Parts(config, mesh, total_updates=config.train.steps * config.train.updates_per_step)
    return GrpoTrainer(config, parts, train_prompts(config, parts.tokenizer))
