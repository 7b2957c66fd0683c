"""Whether a run fits its GPUs: the config's models and data for the planner."""

from dataclasses import replace

from megatron_rl.config.load import Loaded
from megatron_rl.config.rules import Config, ConfigError
from megatron_rl.config.schema import EvaluationConfig
from megatron_rl.models.hf_config import load_shape
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.memory import Case
from megatron_rl.planning.page import describe_plan, parse_memory
from megatron_rl.trainers.critic import CriticTrainerConfig, critic_model


def on_gpus(loaded: Loaded, gpus: int) -> Config:
    """The config, with the data-parallel size that it has on so many GPUs."""
    config = loaded.config
    if isinstance(config, EvaluationConfig):
        raise ConfigError("--gpus plans a training run, and trainer=eval trains nothing")
    if gpus < 1:
        raise ConfigError(f"--gpus={gpus} must be at least 1")
    layout = Layout.of(config.parallel, gpus)
    return replace(config, parallel=replace(config.parallel, dp=layout.dp))


def size_up(config: Config, lengths: list[int], gpus: int, memory: str) -> tuple[str, bool]:
    """The plan of a run on `gpus` of so much memory each, and whether it fits; `lengths` are its first step's."""
    layout = Layout.of(config.parallel, gpus)
    critic = None
    if isinstance(config, CriticTrainerConfig):
        critic = load_shape(critic_model(config).path).as_scalar()
    case = Case(config=config, actor=load_shape(config.model.path), critic=critic, layout=layout)
    return describe_plan(case, lengths, parse_memory(memory))
