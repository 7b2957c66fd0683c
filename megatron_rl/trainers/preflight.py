"""What can be known before a process is started: does the config fit the model, the data and the rewards?

`train` looks before it starts torchrun, so that a mistake is one line and not a traceback per rank; `check` shows what
it saw.
"""

import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rl.checkpoint.hf import SafetensorsReader
from megatron_rl.checkpoint.store import check_model, find_checkpoint, read_state
from megatron_rl.config.load import Loaded
from megatron_rl.config.rules import Config
from megatron_rl.config.schema import (
    PRETRAINED,
    RANDOM,
    EmaAxis,
    EngineName,
    EvaluationConfig,
    GrpoConfig,
    ModelConfig,
    PolicyConfig,
    RewardConfig,
    RolloutTrainerConfig,
    SamplingConfig,
    SdpoConfig,
)
from megatron_rl.data.planner import plan_step
from megatron_rl.data.sources import TASK_PREFIX
from megatron_rl.data.tokenizer import load_tokenizer, read_generation_eos, stop_ids
from megatron_rl.models import transformer_engine
from megatron_rl.models.build import weight_map
from megatron_rl.models.hf_config import ModelShape, check_layout, load_shape, num_parameters, tensor_shapes
from megatron_rl.models.hf_map import SCALAR_HEAD
from megatron_rl.parallel.device import ON_CPU
from megatron_rl.rewards.pool import RewardPool
from megatron_rl.rewards.reasoning import check_task
from megatron_rl.trainers.correction import read_criteria
from megatron_rl.trainers.critic import CriticTrainerConfig, critic_model
from megatron_rl.trainers.data import held_out_prompts, problems, train_demonstrations, train_prompts
from megatron_rl.trainers.guards import rules_of
from megatron_rl.trainers.resume import checkpoint_to_continue
from megatron_rl.trainers.sdpo import reprompt_options
from megatron_rl.workers.critic import ROLE

# Of vLLM 0.32 (CPUAttentionBackend.get_supported_head_sizes).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a run would start from."""

    parameters: int
    train_rows: int
    held_out_rows: int
    step_lengths: list[int]
    warnings: list[str]


def preflight(config: Config | EvaluationConfig) -> Findings:
    """Raises ValueError, in the terms of the config, on what would stop the run; starts no rank and reads no weight."""
    if isinstance(config, EvaluationConfig):
        return _of_evaluation(config)
    if not ON_CPU:
        transformer_engine.check()
    if config.log.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"log.wandb={config.log.wandb!r} needs wandb: pip install wandb, or remove log.wandb")
    tokenizer = _check_model(config, checkpoint_to_continue(config))
    rules_of(config)
    lengths, rows = _first_step(config, tokenizer)
    held_out = held_out_prompts(config, tokenizer)
    if isinstance(config, CriticTrainerConfig):
        _check_critic(config, tokenizer)
    if isinstance(config, PolicyConfig):
        read_criteria(config.rollout_correction.reject)
    if isinstance(config, SdpoConfig):
        reprompt_options(config)
    if isinstance(config, RolloutTrainerConfig) or held_out is not None:
        _check_reward(config.reward, config.data.train, config.data.val)
    _plan(config, lengths)
    return Findings(
        parameters=num_parameters(config.model.path),
        train_rows=rows,
        held_out_rows=len(held_out) if held_out is not None else 0,
        step_lengths=lengths,
        warnings=_warnings(config),
    )


def _of_evaluation(config: EvaluationConfig) -> Findings:
    """What an evaluation would answer; every prompt is looked at."""
    tokenizer = _check_model(config, None)
    prompts = problems(config, tokenizer).all()[: config.eval.limit]
    _check_reward(config.reward, config.data.val)
    longest = config.eval.max_new_tokens or config.rollout.max_new_tokens
    return Findings(
        parameters=num_parameters(config.model.path),
        train_rows=0,
        held_out_rows=len(prompts),
        step_lengths=[len(prompt.token_ids) + longest for prompt in prompts],
        warnings=[],
    )


def _check_model(config: Config | EvaluationConfig, latest: Path | None) -> PreTrainedTokenizerBase:
    """The model can be cut as the layout says, has weights, and goes with its tokenizer, which is returned."""
    shape = load_shape(config.model.path)
    _check_engine(config.rollout, shape.head_dim)
    check_layout(shape, config.parallel)
    _check_weights(config.model, shape, latest)
    tokenizer = load_tokenizer(config.model.path)
    _check_vocabulary(tokenizer, shape)
    return tokenizer


def _check_engine(rollout: SamplingConfig, head_dim: int) -> None:
    """A named engine is there and can run the model, where this process can know."""
    name, server = rollout.engine.value, rollout.vllm.server
    if rollout.engine is EngineName.vllm_server:
        if server.exchange is not None and not Path(server.exchange).is_dir():
            raise ValueError(
                f"rollout.vllm.server.exchange={server.exchange!r} is no directory: create it, or name another"
            )
        if server.urls:
            return
        if server.python is not None and shutil.which(server.python) is None:
            raise ValueError(
                f"rollout.vllm.server.python={server.python!r} is no program: name an interpreter that has vLLM"
            )
        if server.python is not None:
            return
    if name in ("vllm", "vllm_server") and importlib.util.find_spec("vllm") is None:
        raise ValueError(
            f"rollout.engine={name} needs the package vllm, which is not installed: docs/vllm.md says how to install "
            "it; rollout.engine=hf needs nothing more"
        )
    if name in ("vllm", "vllm_server") and ON_CPU and head_dim not in CPU_HEAD_SIZES:
        raise ValueError(
            f"rollout.engine={name}: the model has attention heads of {head_dim} columns, and vLLM's attention on a "
            f"CPU takes only those of {', '.join(map(str, CPU_HEAD_SIZES))}. Set rollout.engine=hf"
        )


def _check_reward(reward: RewardConfig, *sources: str | None) -> None:
    """It can be loaded with its options, and would not refuse every answer to such a task, one by one."""
    for name, options in _judges(reward.name, reward.options):
        if name == "reasoning":
            for source in sources:
                check_task((source or "").removeprefix(TASK_PREFIX), evaluate=bool(options.get("evaluate")))
    RewardPool(reward.name, reward.options, workers=1, deadline_s=reward.deadline_s, memory_gb=reward.memory_gb).close()


def _judges(name: str, options: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The reward, or those that a combined one is the sum of; what is not a reward is left to the pool to refuse."""
    listed = options.get("rewards") if name == "combined" else None
    if not isinstance(listed, Sequence):
        yield name, options
        return
    for item in listed:
        if isinstance(item, Mapping):
            yield from _judges(str(item.get("name")), item.get("options") or {})


def _warnings(config: Config) -> list[str]:
    """What can be run, and is likely to disappoint."""
    found = []
    if isinstance(config, GrpoConfig):
        if config.ema.axis is not EmaAxis.none and config.ema.beta < 0.5:
            found.append(
                f"ema.beta={config.ema.beta} is below 0.5: weights are mostly history, and the gradient biased"
            )
        if config.ema.axis is EmaAxis.step and config.train.epochs_per_step == 1:
            found.append("ema.axis=step averages over visits to a sample, and train.epochs_per_step=1 visits it once")
    return found


def _check_weights(model: ModelConfig, shape: ModelShape, latest: Path | None) -> None:
    """The weights to start from, and the checkpoint that the run would continue from, are of this model."""
    if model.weights == PRETRAINED:
        reader = SafetensorsReader(model.path)
        reader.check(weight_map(shape).hf_names())
        reader.check_shapes(tensor_shapes(model.path))
    elif model.weights != RANDOM:
        check_model(find_checkpoint(model.weights), "actor", shape.identity())
    if latest is not None:
        check_model(latest, "actor", shape.identity())


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> None:
    if len(tokenizer) > shape.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model's vocabulary {shape.vocab_size}: they do not "
            "belong together, or the model's embedding must be resized"
        )


def _check_critic(config: CriticTrainerConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The critic can be cut like the policy, reads its tokens, and has weights to start from."""
    model = critic_model(config)
    try:
        shape = load_shape(model.path).as_scalar()
        check_layout(shape, config.parallel)
        own = load_tokenizer(model.path).get_vocab()
    except ValueError as error:
        raise ValueError(f"critic.path={model.path!r}: {error}") from error
    if own != tokenizer.get_vocab() or len(own) > shape.vocab_size:
        raise ValueError(
            f"critic.path={model.path!r} has another vocabulary ({len(own)} tokens) than the policy's in model.path="
            f"{config.model.path!r} ({len(tokenizer)}): name a critic with the policy's tokenizer"
        )
    if model.weights == PRETRAINED:
        reader = SafetensorsReader(model.path)
        reader.check(weight_map(shape).hf_names() - (frozenset(SCALAR_HEAD.hf) - frozenset(reader.files)))
    elif model.weights != RANDOM:
        checkpoint = find_checkpoint(model.weights, "critic.weights" if config.critic.weights else "model.weights")
        own_role = ROLE in read_state(checkpoint)["models"]
        identity = shape.identity() if own_role else load_shape(model.path).identity()
        check_model(checkpoint, ROLE if own_role else "actor", identity)


def _first_step(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Sequence lengths of the first step, and the rows there are; rollouts count at their longest."""
    if isinstance(config, RolloutTrainerConfig):
        prompts = train_prompts(config, tokenizer)
        longest = [len(p.token_ids) + config.rollout.max_new_tokens for p in prompts.next(config.train.batch_size)]
        return [length for length in longest for _ in range(config.rollout.group_size)], len(prompts)
    source = train_demonstrations(config, tokenizer, stop_ids(tokenizer, read_generation_eos(config.model.path)))
    drawn = source.next(config.train.batch_size)
    return [len(shown.prompt.token_ids) + len(shown.token_ids) for shown in drawn], len(source)


def _plan(config: Config, lengths: list[int]) -> list[int]:
    """Tokens of each micro-batch of the first update on the first rank."""
    parallel = config.parallel
    cuts = config.train.mini_batches_per_step if isinstance(config, RolloutTrainerConfig) else 1
    lengths = lengths[: max(len(lengths) // cuts, 1)]
    plan = plan_step(
        lengths,
        dp_size=parallel.dp or 1,
        max_tokens=config.train.max_tokens_per_micro_batch,
        min_micro_batches=parallel.pp,
        multiple_of=parallel.pp if parallel.vpp > 1 else 1,
    )
    return [sum(lengths[i] for i in indices) for indices in plan.micro_batches[0]]


def describe(loaded: Loaded, findings: Findings) -> str:
    """The resolved options with their origins, the layout, and how the first step would be cut."""
    config, parallel = loaded.config, loaded.config.parallel
    width = max(map(len, loaded.origins))
    lines = [f"{key:<{width}}  {_value(config, key)!s:<28}  {origin}" for key, origin in loaded.origins.items()]
    processes = parallel.tp * parallel.pp * (parallel.dp or 1)
    lines += [
        "",
        f"model        {findings.parameters:,} parameters in {config.model.path}",
        f"layout       tp={parallel.tp} pp={parallel.pp} vpp={parallel.vpp} dp={parallel.dp or 1}: "
        f"{processes} process(es)",
    ]
    if isinstance(config, EvaluationConfig):
        longest = max(findings.step_lengths)
        return "\n".join(
            [*lines, f"data         {findings.held_out_rows} problems, with answers up to {longest} tokens"]
        )
    tokens = _plan(config, findings.step_lengths)
    return "\n".join(
        [
            *lines,
            f"data         {findings.train_rows} rows to train on, {findings.held_out_rows} held out",
            f"first update {len(tokens)} micro-batch(es) per rank, {min(tokens)} to {max(tokens)} tokens of at most "
            f"{config.train.max_tokens_per_micro_batch}",
        ]
    )


def _value(config: Config | EvaluationConfig, key: str) -> object:
    value: object = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
