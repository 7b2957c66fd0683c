"""What the user wrote, file by file and override by override, before anything is made of it."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rl.config.rules import ConfigError

MAX_DEPTH = 50  # those with a meaning have three levels, and what an option itself holds
# What PyYAML and OmegaConf raise on text that they cannot read: of a wrong `!!int`, `!!bool` or `!!timestamp`, for one,
# PyYAML passes on what Python says; of a file that holds a number only, OmegaConf says OSError.
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, LookupError, AttributeError, OSError)


@dataclass(frozen=True, slots=True)
class Layer:
    """Some options and where they were written."""

    origin: str
    options: DictConfig


def file_layers(path: Path, above: tuple[Path, ...] = ()) -> list[Layer]:
    """The file's layer, after those of the file that its `base` names (relative to it)."""
    options = plain(_read(path))
    path = path.resolve() if above else path
    if path.resolve() in above:
        raise ConfigError(f"{above[-1]}: base={str(path)!r} leads back to itself")
    base = options.pop("base", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{path}: base={base!r} must be the name of a file")
    layers = [] if base is None else file_layers(path.parent / base, (*above, path.resolve()))
    return [*layers, Layer(str(path), OmegaConf.create(options))]


def override_layer(override: str) -> Layer:
    """The layer of one `a.b=c`."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=c")
    try:
        _check_depth(value, key.count("."))
        return Layer(f"override {override!r}", OmegaConf.from_dotlist([override]))
    except UNREADABLE as error:
        raise ConfigError(f"override {override!r} cannot be read: {' '.join(str(error).split())}") from error


def plain(options: DictConfig) -> dict[Any, Any]:
    """The options as they are written, interpolations and all."""
    written = OmegaConf.to_container(options)
    assert isinstance(written, dict)
    return written


def _read(path: Path) -> DictConfig:
    try:
        if not path.is_file():
            raise ConfigError(f"config file {str(path)!r} {'is not a file' if path.exists() else 'does not exist'}")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: it is not UTF-8 text ({error})") from error
    try:
        _check_depth(text)
        options = OmegaConf.load(io.StringIO(text))
    except UNREADABLE as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(options, DictConfig):
        raise ConfigError(f"{path} must hold keys and values, not a list")
    return options


def _check_depth(text: str, depth: int = 0) -> None:
    """Refuses what libyaml and OmegaConf would walk into by recursion, to the end of the stack."""
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        interpolations = event.value.count("${") if isinstance(event, yaml.ScalarEvent) else 0
        if depth + interpolations > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
