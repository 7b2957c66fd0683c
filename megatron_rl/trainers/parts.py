"""What trainers are put together from beside a model: tokenizer, engine, rewards. Wiring, no logic."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import EngineName, EvaluationConfig, TrainerConfig
from megatron_rl.data.tokenizer import load_tokenizer, pad_id, read_generation_eos, stop_ids
from megatron_rl.models.hf_config import load_shape
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.rewards.pool import RewardPool, score_groups
from megatron_rl.rollout.engine import Engine, Sampling
from megatron_rl.rollout.hf_engine import HFEngine
from megatron_rl.rollout.sync import push
from megatron_rl.rollout.vllm.options import engine_options
from megatron_rl.rollout.vllm.served import ServedEngine
from megatron_rl.rollout.vllm.server import Launch
from megatron_rl.types import Prompt, RolloutGroup
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import DTYPES, ShardedModel


def longest(config: Config | EvaluationConfig) -> int:
    """Tokens of a prompt and its answer, at most."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)


def server_options(config: Config | EvaluationConfig) -> dict[str, Any]:
    """How a vLLM server is started that the config's trainer can use."""
    rollout = config.rollout
    return engine_options(
        config.model.path,
        dtype=DTYPES[config.model.dtype.value],
        max_sequences=rollout.max_sequences,
        max_tokens=longest(config),
        kv_cache_gb=rollout.vllm.kv_cache_gb,
        tp=rollout.vllm.tp,
    )


class Parts:
    """The shared parts of every trainer. Engine and reward workers start when they are first asked for."""

    def __init__(self, config: Config | EvaluationConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.model.path)
        self.workers: list[ModelWorker] = []  # that train on this rank

    @cached_property
    def stop(self) -> tuple[int, ...]:
        """The ids that end a response."""
        return stop_ids(self.tokenizer, read_generation_eos(self.config.model.path))

    @cached_property
    def engine(self) -> Engine:
        config, rollout = self.config, self.config.rollout
        dtype = DTYPES[config.model.dtype.value]
        if rollout.engine is EngineName.hf:
            return HFEngine(
                config.model.path,
                self.tokenizer,
                dtype=dtype,
                stop=self.stop,
                pad=pad_id(self.tokenizer),
                max_sequences=rollout.max_sequences,
            )
        tied = load_shape(config.model.path).tied
        if rollout.engine is EngineName.vllm_server:
            return self._served(dtype, tied)
        from megatron_rl.rollout.vllm.engine import VLLMEngine  # late: vLLM is asked for

        return VLLMEngine(
            config.model.path,
            self.tokenizer,
            dtype=dtype,
            stop=self.stop,
            tied=tied,
            max_sequences=rollout.max_sequences,
            max_tokens=longest(config),
            kv_cache_gb=rollout.vllm.kv_cache_gb,
            tp=rollout.vllm.tp,
            sleep=rollout.vllm.sleep,
        )

    def _served(self, dtype: torch.dtype, tied: bool) -> Engine:
        config, rollout, server = self.config, self.config.rollout, self.config.rollout.vllm.server
        directory, tp, options = Path(config.run.dir), rollout.vllm.tp, server_options(config)
        directory.mkdir(parents=True, exist_ok=True)
        own = [
            Launch(
                options=options,
                host=server.host,
                python=server.python,
                gpus=tuple(server.gpus[number * tp : (number + 1) * tp]),
                log=directory / f"server_{number}.log",
            )
            for number in range(server.count)
        ]
        return ServedEngine(
            self.tokenizer,
            dtype=dtype,
            stop=self.stop,
            tied=tied,
            max_sequences=rollout.max_sequences,
            servers=server.urls or own,
            exchange=server.exchange,
            broadcast=server.broadcast,
            start_timeout_s=server.start_timeout_s,
            timeout_s=server.timeout_s,
            restarts=server.restarts,
        )

    @cached_property
    def pool(self) -> RewardPool:
        reward = self.config.reward
        return RewardPool(
            reward.name,
            reward.options,
            workers=reward.workers,
            deadline_s=reward.deadline_s,
            memory_gb=reward.memory_gb,
        )

    def push(self, model: ShardedModel, version: int | None = None) -> dict[str, float]:
        """Gives the engine the model's weights, under its own version or another; `sync/*`. Collective."""
        ignored = self.config.guards.ignore if isinstance(self.config, TrainerConfig) else []
        version = model.version if version is None else version
        return push(model.named_hf_weights, self.engine, version, check="weight_checksum" not in ignored)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group of answers per prompt, on every rank.

        With `rollout.vllm.sleep` engine and trainer keep memory in turn. Collective.
        """
        rollout = self.config.rollout
        workers = self.workers if rollout.engine is EngineName.vllm and rollout.vllm.sleep else []
        for worker in workers:
            worker.give_back()
        try:
            return self.engine.generate(prompts, sampling)
        finally:
            for worker in workers:
                worker.take_back()

    def close(self) -> None:
        """Ends the reward workers and the engine."""
        if "engine" in self.__dict__:
            self.engine.close()
        if "pool" in self.__dict__:
            self.pool.close()


def score(pool: RewardPool, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
    """Judges the groups, each rank its share; all of them on every rank. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, len(groups), world))
    judged = list(zip(mine, score_groups(pool, [groups[place] for place in mine])))
    return [group for _, group in sorted(gather_over_world(judged), key=lambda item: item[0])]
