"""What trainers are put together from: tokenizer, data, engine, rewards. Wiring, no logic."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import DataConfig, SftDataConfig
from megatron_rl.data.sources import ExampleEncoder, ExampleSource, PromptEncoder, PromptSource, Rows, load_rows
from megatron_rl.data.tokenizer import load_tokenizer, pad_id, read_generation_eos, stop_ids
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.rewards.pool import RewardPool, score_groups
from megatron_rl.rollout.hf_engine import HFEngine
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.model_worker import DTYPES, ModelWorker


class Parts:
    """The shared parts of every trainer. Engine and reward workers start when they are first asked for."""

    def __init__(self, config: Config, mesh: Mesh, *, total_updates: int) -> None:
        """`total_updates` is the length of the learning-rate schedule."""
        self.config, self.mesh = config, mesh
        self.tokenizer = load_tokenizer(config.model.path)
        self.actor = ModelWorker(config.model, config.optim, mesh, total_steps=total_updates)

    @cached_property
    def engine(self) -> HFEngine:
        config = self.config
        return HFEngine(
            config.model.path,
            self.tokenizer,
            dtype=DTYPES[config.model.dtype.value],
            stop=stop_ids(self.tokenizer, read_generation_eos(config.model.path)),
            pad=pad_id(self.tokenizer),
            max_sequences=config.rollout.max_sequences,
        )

    @cached_property
    def pool(self) -> RewardPool:
        reward = self.config.reward
        return RewardPool(reward.name, reward.options, workers=reward.workers, deadline_s=reward.deadline_s)

    def close(self) -> None:
        """Ends the reward workers."""
        if "pool" in self.__dict__:
            self.pool.close()


def _prompt_encoder(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
    return PromptEncoder(
        tokenizer=tokenizer,
        max_prompt_tokens=data.max_prompt_tokens,
        prompt_key=data.prompt_key,
        chat=data.chat.value,
        truncation_side=data.truncation_side.value,
    )


def _rows(source: str, task: Mapping[str, Any]) -> Rows:
    options = dict(task)
    return load_rows(source, size=options.pop("size", None), seed=options.pop("seed", 0), options=options or None)


def train_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource:
    """The prompts of `data.train`."""
    rows = _rows(config.data.train, config.data.task)
    return PromptSource(rows, _prompt_encoder(config.data, tokenizer), seed=config.train.seed)


def train_examples(config: Config, tokenizer: PreTrainedTokenizerBase) -> ExampleSource:
    """The prompts of `data.train` with their responses."""
    assert isinstance(config.data, SftDataConfig)
    encoder = ExampleEncoder(prompt=_prompt_encoder(config.data, tokenizer), response_key=config.data.response_key)
    return ExampleSource(_rows(config.data.train, config.data.task), encoder, seed=config.train.seed)


def held_out_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSource | None:
    """The prompts of `data.val`, if it is set."""
    if config.data.val is None:
        return None
    rows = _rows(config.data.val, config.data.val_task)
    return PromptSource(rows, _prompt_encoder(config.data, tokenizer), seed=config.train.seed)


def score(pool: RewardPool, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Judges the groups, each rank its share; all of them on every rank. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(groups), world))
    judged = list(zip(mine, score_groups(pool, [groups[place] for place in mine])))
    return [group for _, group in sorted(gather_over_world(judged), key=lambda item: item[0])]
