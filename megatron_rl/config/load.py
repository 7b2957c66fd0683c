"""From a YAML file and `a.b=c` overrides to a checked config object, or one sentence that says what is wrong."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from megatron_rl.config.schema import SCHEMAS, Algorithm, DType, GrpoConfig, RolloutConfig, SftConfig

Config = SftConfig | GrpoConfig

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")

# GRPO (Shao et al., 2024, with dual clip), Dr. GRPO (Liu et al., 2025), GSPO (Zheng et al., 2025).
ALGORITHM_DEFAULTS: dict[Algorithm, dict[str, Any]] = {
    Algorithm.grpo: {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "normalize_by_std": True,
        "aggregation": "token-mean",
    },
    Algorithm.dr_grpo: {
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "normalize_by_std": False,
        "aggregation": "seq-mean-token-sum-norm",
    },
    Algorithm.gspo: {
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "dual_clip": 0.0,
        "normalize_by_std": True,
        "aggregation": "seq-mean-token-mean",
    },
}


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message names the field, the value and what to change."""


def _fields(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema, sections included."""
    for item in dataclasses.fields(schema):
        yield prefix + item.name
        if dataclasses.is_dataclass(item.type):
            yield from _fields(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]


def _unknown(schema: type, trainer: str, key: str) -> ConfigError:
    known = list(_fields(schema))
    near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
    if not near:
        near = [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown key {key!r} for trainer {trainer!r}{hint}")


def _merge(config: DictConfig, change: Any, schema: type, trainer: str, origin: str) -> DictConfig:
    try:
        merged = OmegaConf.merge(config, change)
    except ConfigKeyError as error:
        raise _unknown(schema, trainer, str(error.full_key)) from error
    except (ValidationError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{origin}: {getattr(error, 'full_key', '') or 'config'}: {reason}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"config file {str(path)!r} does not exist")
    try:
        user = OmegaConf.load(path)
    except YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(user, DictConfig):
        raise ConfigError(f"{path} must hold keys and values, not a list")
    return user


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Schema defaults < the YAML file < `a.b=c` overrides; then the checks."""
    path = Path(path)
    user = _read(path)
    trainer = user.get("trainer")
    if trainer not in SCHEMAS:
        raise ConfigError(f"{path}: trainer={trainer!r} is not one of {', '.join(SCHEMAS)}")
    schema = SCHEMAS[trainer]
    config = _merge(OmegaConf.structured(schema), user, schema, trainer, str(path))
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not of the form a.b=c")
        config = _merge(config, OmegaConf.from_dotlist([override]), schema, trainer, f"override {override!r}")
    if config.trainer != trainer:
        raise ConfigError(f"trainer={config.trainer!r} cannot be overridden; the file says {trainer!r}")
    try:
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{path}: {missing[0]} must be set (file or {missing[0]}=VALUE)")
        result = OmegaConf.to_object(config)
    except (MissingMandatoryValue, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, SftConfig | GrpoConfig)
    if isinstance(result, GrpoConfig):
        _name_the_algorithm(result)
    if result.rollout.parity_tolerance is None:
        # Two implementations of one bfloat16 model differ by about this much on a token now and then.
        result.rollout.parity_tolerance = 1e-3 if result.model.dtype is DType.float32 else 0.25
    check(result)
    return result


def save_config(config: Config, path: str | Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _name_the_algorithm(config: GrpoConfig) -> None:
    """Fills what the user left open with the named algorithm's own values."""
    for key, value in ALGORITHM_DEFAULTS[config.algorithm.name].items():
        if getattr(config.algorithm, key) is None:
            setattr(config.algorithm, key, value)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _check_positive(config: Config) -> None:
    values: dict[str, float] = {
        "parallel.tp": config.parallel.tp,
        "parallel.pp": config.parallel.pp,
        "parallel.vpp": config.parallel.vpp,
        "train.steps": config.train.steps,
        "train.batch_size": config.train.batch_size,
        "train.max_tokens_per_micro_batch": config.train.max_tokens_per_micro_batch,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "rollout.max_sequences": config.rollout.max_sequences,
        "rollout.group_size": config.rollout.group_size,
        "reward.workers": config.reward.workers,
        "reward.deadline_s": config.reward.deadline_s,
        "optim.clip_grad": config.optim.clip_grad,
        "checkpoint.keep": config.checkpoint.keep,
    }
    if config.parallel.dp is not None:
        values["parallel.dp"] = config.parallel.dp
    for key, value in values.items():
        _require(value > 0, f"{key}={value} must be greater than 0")
    for key, value in {
        "optim.lr": config.optim.lr,
        "optim.warmup_steps": config.optim.warmup_steps,
        "eval.every": config.eval.every,
        "eval.samples": config.eval.samples,
        "checkpoint.every": config.checkpoint.every,
        "rollout.parity_every": config.rollout.parity_every,
    }.items():
        _require(value >= 0, f"{key}={value} must not be negative")


def _check_rollout(rollout: RolloutConfig) -> None:
    _require(rollout.engine == "hf", f"rollout.engine={rollout.engine!r} is not one of: hf")
    _require(rollout.temperature > 0, f"rollout.temperature={rollout.temperature} must be greater than 0")
    _require(0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p} must be in (0, 1]")
    _require(rollout.top_k >= 0, f"rollout.top_k={rollout.top_k} must not be negative; 0 means no limit")


def check(config: Config) -> None:
    """Values and combinations that cannot be run; raises ConfigError on the first."""
    _check_positive(config)
    _check_rollout(config.rollout)
    parallel = config.parallel
    _require(
        parallel.vpp == 1 or parallel.pp > 1,
        f"parallel.vpp={parallel.vpp} needs parallel.pp > 1: it cuts stages in chunks",
    )
    _require(
        not parallel.sequence_parallel or parallel.tp > 1,
        "parallel.sequence_parallel=true needs parallel.tp > 1: with one tensor rank nothing is cut",
    )
    _require(
        config.optim.min_lr <= config.optim.lr,
        f"optim.min_lr={config.optim.min_lr} is above optim.lr={config.optim.lr}",
    )
    if isinstance(config, GrpoConfig):
        _check_grpo(config)


def _check_grpo(config: GrpoConfig) -> None:
    algorithm, updates = config.algorithm, config.train.updates_per_step
    _require(
        algorithm.aggregation in AGGREGATIONS,
        f"algorithm.aggregation={algorithm.aggregation!r} is not one of {', '.join(AGGREGATIONS)}",
    )
    _require(
        config.rollout.group_size > 1,
        f"rollout.group_size={config.rollout.group_size} must be at least 2: advantages compare answers to one prompt",
    )
    _require(
        updates > 0 and config.train.batch_size % updates == 0,
        f"train.updates_per_step={updates} does not divide train.batch_size={config.train.batch_size}",
    )
    _require(
        not algorithm.dual_clip or algorithm.dual_clip > 1,
        f"algorithm.dual_clip={algorithm.dual_clip} must be above 1, or 0 for none",
    )
    _require(
        config.rollout.top_p == 1.0 and config.rollout.top_k == 0,
        "rollout.top_p < 1 or rollout.top_k > 0 would train on samples of another distribution than the loss assumes; "
        "use them for evaluation and supervised runs only",
    )
