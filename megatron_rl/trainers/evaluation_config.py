"""What `megatron-rl eval MODEL [DATA] [a.b=c ...]` evaluates: one config, whatever MODEL is.

A trainer's config, or that of a run, gives the defaults; what trains is left out. A checkpoint gives the weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron_rl.checkpoint.store import HF, STATE, find_checkpoint, read_state
from megatron_rl.config.layers import Layer, file_layers, override_layer
from megatron_rl.config.load import Loaded, as_dict, load, of_trainer, options_of, resolve, trainer_of, written_in
from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import PRETRAINED, SCHEMAS, EvaluationConfig
from megatron_rl.data.sources import TASK_PREFIX
from megatron_rl.trainers.resume import latest_checkpoint

SAVED_CONFIG, CHECKPOINTS = "config.yaml", "checkpoints"
RESULTS = Path("runs/eval")  # of models that no run made


def evaluation_config(model: str, data: str | None = None, overrides: Sequence[str] = ()) -> Loaded:
    """The checked config; ValueError where MODEL is nothing of what it can be, or an option is wrong."""
    path = Path(model)
    if (path / SAVED_CONFIG).is_file() and not (path / CHECKPOINTS).is_dir():
        path = path / SAVED_CONFIG  # an evaluation's own directory
    above = [] if data is None else [Layer(f"DATA {data!r}", OmegaConf.create({"data": {"val": data}}))]
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        layers = file_layers(path)
        if trainer_of(layers, str(path)) == "eval":
            return resolve([*layers, *above, *map(override_layer, overrides)], str(path))
        defaults, overrides = _of_trainer(path, overrides)
    elif (path / STATE).is_file() or (path / SAVED_CONFIG).is_file():
        checkpoint = find_checkpoint(path, "MODEL")
        in_run = checkpoint.resolve().parent.name == CHECKPOINTS
        place = checkpoint.parents[1] / "eval" if in_run else RESULTS
        config = read_state(checkpoint).get("config")
        if config is not None:
            defaults = _defaults(config, str(checkpoint), place / checkpoint.name)
        else:  # no run wrote it: it was imported
            defaults = _alone(model, str(checkpoint / HF), str(checkpoint), place / checkpoint.name)
    elif (path / "config.json").is_file():
        defaults = _alone(model, model, PRETRAINED, RESULTS / path.resolve().name)
    else:
        raise ConfigError(
            f"MODEL={model!r} is no Hugging Face directory (with config.json), run directory (with {SAVED_CONFIG} and "
            f"{CHECKPOINTS}), checkpoint (with {STATE}) or .yaml file"
        )
    loaded = resolve([defaults, *above, *map(override_layer, overrides)], model)
    if loaded.origins["run.dir"] == defaults.origin and loaded.config.data.val is not None:
        loaded.config.run.dir += f"-{_name_of(loaded.config.data.val)}"
        loaded.origins["run.dir"] = "derived"
    return loaded


def _of_trainer(path: Path, overrides: Sequence[str]) -> tuple[Layer, list[str]]:
    """The defaults that a trainer's config gives under its overrides, and those that an evaluation alone knows.

    The weights are those of the run's latest checkpoint, or what the run would start from.
    """
    known = set(options_of(SCHEMAS[trainer_of(file_layers(path), str(path))]))
    alone = set(options_of(EvaluationConfig)) - known
    own = [override for override in overrides if override.partition("=")[0] in alone]
    config = of_trainer(load(path, [override for override in overrides if override not in own]), str(path))
    checkpoint = latest_checkpoint(config)
    place = Path(config.run.dir) / "eval" / (checkpoint.name if checkpoint else "start")
    return _defaults(as_dict(config), str(checkpoint or config.model.weights), place), own


def _alone(model: str, path: str, weights: str, place: Path) -> Layer:
    """The first layer of the config of a model that no run made."""
    own = {"trainer": "eval", "model": {"path": path, "weights": weights}, "run": {"dir": str(place)}}
    return Layer(f"MODEL {model!r}", OmegaConf.create(own))


def _defaults(tree: Mapping[str, Any], weights: str, place: Path) -> Layer:
    """What a trainer's options say of an evaluation, as the first layer of its config."""
    kept: dict[str, Any] = {}
    for key in options_of(EvaluationConfig):
        for value in written_in(tree, key):
            *sections, name = key.split(".")
            inner = kept
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[name] = value
    kept["trainer"] = "eval"
    kept["model"] |= {"weights": weights}
    kept["run"] |= {"dir": str(place), "resume": True}
    return Layer(f"config of {weights}", OmegaConf.create(kept))


def _name_of(data: str) -> str:
    return data.removeprefix(TASK_PREFIX) if data.startswith(TASK_PREFIX) else Path(data).stem
