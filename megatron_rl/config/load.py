"""From a YAML file and `a.b=c` overrides to a checked config object, or one sentence that says what is wrong."""

import copy
import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_rl.config.algorithms import ALGORITHM_DEFAULTS
from megatron_rl.config.layers import Layer, file_layers, override_layer, plain
from megatron_rl.config.rules import Config, ConfigError, check
from megatron_rl.config.schema import (
    SCHEMAS,
    DType,
    EmaAxis,
    EmaGradient,
    EngineName,
    EvaluationConfig,
    GrpoConfig,
    PolicyConfig,
    SdpoConfig,
    TrainerConfig,
)

MOST_TEACHER_TOKENS = 10240  # as in the code of SDPO's authors


@dataclass(frozen=True, slots=True)
class Loaded:
    """A config, and for every option (dotted) where its value comes from."""

    config: Config | EvaluationConfig
    origins: dict[str, str]


def options_of(schema: type, prefix: str = "") -> Iterator[str]:
    """Every option of a schema, as a dotted key."""
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(item.type):
            yield from options_of(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            yield prefix + item.name


def _unknown(trainer: str, key: str) -> ConfigError:
    """Names the nearest key, or the trainer that has this one."""
    known = list(options_of(SCHEMAS[trainer]))
    near = difflib.get_close_matches(key, known, 1, cutoff=0.6)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:1]
    owners = [
        other
        for other, schema in SCHEMAS.items()
        if any(name == key or name.startswith(f"{key}.") for name in options_of(schema))
    ]
    hint = f"; it belongs to trainer {owners[0]!r}" if owners else f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"unknown key {key!r} for trainer {trainer!r}{hint}")


def _reason(error: Exception) -> str:
    """What OmegaConf says, without the lines about its own types, after the option it says it of."""
    key, first = getattr(error, "full_key", None), next(iter(str(error).splitlines()), type(error).__name__)
    return f"{key}: {first}" if key else first


@functools.cache
def _defaults(trainer: str) -> DictConfig:
    """The schema and its defaults, to be copied."""
    defaults = OmegaConf.structured(SCHEMAS[trainer])
    assert isinstance(defaults, DictConfig)
    return defaults


def _merge(config: DictConfig, layer: Layer, trainer: str) -> None:
    try:
        config.merge_with(layer.options)
    except ConfigKeyError as error:
        raise _unknown(trainer, str(error.full_key)) from error
    except (OmegaConfBaseException, TypeError) as error:  # a TypeError where one is a list and the other is not
        raise ConfigError(f"{layer.origin}: {_reason(error)}") from error


def load(path: str | Path, overrides: Sequence[str] = ()) -> Loaded:
    """Schema defaults < the YAML file's `base` < the file < `a.b=c` overrides; then the checks."""
    return resolve([*file_layers(Path(path)), *map(override_layer, overrides)], str(path))


def trainer_of(layers: Sequence[Layer], name: str) -> str:
    """The trainer that the layers, all of `name`, agree on."""
    named = [held["trainer"] for layer in layers if "trainer" in (held := plain(layer.options))]
    trainer = named[0] if named else None
    if not isinstance(trainer, str) or trainer not in SCHEMAS:
        raise ConfigError(f"{name}: trainer={trainer!r} is not one of {', '.join(SCHEMAS)}")
    if any(other != trainer for other in named):
        raise ConfigError(f"trainer={named[-1]!r} cannot be overridden; the file says {trainer!r}")
    return trainer


def resolve(layers: Sequence[Layer], name: str) -> Loaded:
    """The checked config of layers, each above those before it; `name` is what a person calls them all."""
    trainer = trainer_of(layers, name)
    config = copy.deepcopy(_defaults(trainer))
    origins = dict.fromkeys(options_of(SCHEMAS[trainer]), "default")
    left_open: set[str] = set()
    for layer in layers:
        _merge(config, layer, trainer)
        options = plain(layer.options)
        written = {key: value for key in origins for value in written_in(options, key)}
        origins.update(dict.fromkeys(written, layer.origin))
        left_open = (left_open - set(written)) | {key for key, value in written.items() if value == MISSING}
    if left_open:
        raise ConfigError(f"{name}: {min(left_open)} is left open by {MISSING!r} and must be set")
    result = _to_object(config, name)
    for key in _complete(result):
        origins[key] = "derived"
    check(result)
    return Loaded(result, origins)


def written_in(options: Any, key: str) -> list[Any]:
    """The value of the dotted key in nested options, if they hold it."""
    for part in key.split("."):
        if not isinstance(options, dict) or part not in options:
            return []
        options = options[part]
    return [options]


def _to_object(config: DictConfig, name: str) -> Config | EvaluationConfig:
    try:
        OmegaConf.resolve(config)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(f"{name}: {missing[0]} must be set (file or {missing[0]}=VALUE)")
        result = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {_reason(error)}") from error
    assert isinstance(result, TrainerConfig | EvaluationConfig)
    return result


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A trainer's config, without the origins."""
    return of_trainer(load(path, overrides), str(path))


def of_trainer(loaded: Loaded, name: str) -> Config:
    """The config, which must be one to train by."""
    if isinstance(loaded.config, EvaluationConfig):
        raise ConfigError(f"{name}: trainer=eval trains nothing: run `megatron-rl eval {name}`, or name a trainer")
    return loaded.config


def as_dict(config: Config | EvaluationConfig) -> dict[str, Any]:
    """The resolved config as plain nested values."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def save_config(config: Config | EvaluationConfig, path: str | Path) -> None:
    """Writes the resolved config as YAML that `load_config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _complete(config: Config | EvaluationConfig) -> list[str]:
    """Fills what was left open: the engine that is installed, the named algorithm's own values, the tolerance."""
    filled = []
    if config.rollout.engine is EngineName.auto:
        config.rollout.engine = EngineName.hf if importlib.util.find_spec("vllm") is None else EngineName.vllm
        filled.append("rollout.engine")
    if isinstance(config, PolicyConfig):
        for key, value in ALGORITHM_DEFAULTS[config.algorithm.name].items():
            if getattr(config.algorithm, key) is None:
                if key == "overlong_buffer" and value is None:
                    value = config.rollout.max_new_tokens // 5
                setattr(config.algorithm, key, value)
                filled.append(f"algorithm.{key}")
    if isinstance(config, GrpoConfig) and config.ema.gradient is None:
        by_step = config.ema.axis is EmaAxis.step
        config.ema.gradient = EmaGradient.current if by_step else EmaGradient.full
        filled.append("ema.gradient")
    if isinstance(config, SdpoConfig) and config.reprompt.max_tokens is None:
        room = config.train.max_tokens_per_micro_batch - config.rollout.max_new_tokens
        config.reprompt.max_tokens = min(MOST_TEACHER_TOKENS, room)
        filled.append("reprompt.max_tokens")
    if isinstance(config, TrainerConfig) and config.rollout.parity_tolerance is None:
        # Two implementations of one bfloat16 model differ by about this much on a token now and then.
        config.rollout.parity_tolerance = 1e-3 if config.model.dtype is DType.float32 else 0.25
        filled.append("rollout.parity_tolerance")
    return filled
