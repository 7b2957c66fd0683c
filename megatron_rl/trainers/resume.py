"""Where a run goes on, and whether it would still be the same run."""

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.store import CheckpointStore, find_checkpoint, read_state
from megatron_rl.config.load import as_dict
from megatron_rl.config.optim import Schedule
from megatron_rl.config.rules import Config

VERSIONED = ("megatron_rl", "torch", "megatron-core", "transformers", "numpy")

# Options that may change while a run goes on: where and how fast it computes, what is saved and shown. The data and the
# models are named here because what they hold is compared itself. Any other option is part of the mathematics.
FREE = (
    "average.offload",
    "checkpoint.",
    "critic.path",
    "critic.weights",
    "data.train",
    "data.val",
    "eval.",
    "guards.",
    "log.",
    "model.path",
    "model.weights",
    "parallel.",
    "reward.deadline_s",
    "reward.memory_gb",
    "reward.workers",
    "rollout.max_sequences",
    "rollout.parity_",
    "rollout.vllm.server.exchange",
    "rollout.vllm.server.gpus",
    "rollout.vllm.server.host",
    "rollout.vllm.server.python",
    "rollout.vllm.server.urls",
    "run.",
    "train.max_tokens_per_micro_batch",
    "train.profile",
)


@dataclass(frozen=True, slots=True)
class Change:
    """An option that is another now, and whether the run computes something else because of it."""

    key: str
    before: object
    now: object
    mathematical: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def checkpoint_store(config: Config) -> CheckpointStore:
    """The run's own checkpoints."""
    options = config.checkpoint
    return CheckpointStore(
        Path(config.run.dir) / "checkpoints",
        keep=options.keep,
        keep_every=options.keep_every,
        background=options.background,
    )


def latest_checkpoint(config: Config) -> Path | None:
    """The newest state of the run, if there is one; refused where another trainer wrote it."""
    path = checkpoint_store(config).latest() if config.run.resume else None
    if path is None and config.checkpoint.load is not None:
        path = find_checkpoint(config.checkpoint.load, "checkpoint.load")
    if path is None:
        return None
    trainer = read_state(path).get("trainer")
    if trainer is None:
        raise ValueError(
            f"{path} was imported: it has weights and nothing of a run to continue; start from them with model.weights"
        )
    if trainer != config.trainer:
        raise ValueError(
            f"{path} is of trainer {trainer!r}, not {config.trainer!r}: name another run.dir or checkpoint.load, or "
            "start over with run.resume=false"
        )
    return path


def checkpoint_to_continue(config: Config) -> Path | None:
    """The same, for a run that goes on; refused where it would not be the same run any more."""
    path = latest_checkpoint(config)
    if path is None:
        return None
    changed = [str(change) for change in changes(path, config) if change.mathematical]
    if changed and not config.run.allow_changes:
        raise ValueError(
            f"continuing {path} with other options would not be the same run: {'; '.join(changed)}. Restore them, or "
            "set run.allow_changes=true to go on with the new ones"
        )
    return path


def changes(path: Path, config: Config) -> list[Change]:
    """The options that differ between the checkpoint's run and this one."""
    before, now = (dict(_flat(tree)) for tree in (read_state(path)["config"], as_dict(config)))
    found = []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            free = key.startswith(FREE) or (key == "train.steps" and config.optim.schedule is Schedule.constant)
            found.append(Change(key, before.get(key), now.get(key), not free))
    return found


def versions() -> dict[str, str]:
    """What this process runs on."""
    held = {name: importlib.metadata.version(name) for name in VERSIONED}
    return {"python": platform.python_version(), **held}


def origin(config: Config) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it."""
    return {
        "trainer": config.trainer,
        "versions": versions(),
        "layout": asdict(config.parallel),
        "config": as_dict(config),
    }


def differences(path: Path, config: Config) -> list[str]:
    """What is worth telling when a run goes on: options and libraries that are others now."""
    held = read_state(path)["versions"]
    libraries = [f"{name} {held.get(name)} -> {now}" for name, now in versions().items() if held.get(name) != now]
    return [*map(str, changes(path, config)), *libraries]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
