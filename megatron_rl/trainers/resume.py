"""Where a run goes on: the latest checkpoint in its directory."""

from pathlib import Path

from megatron_rl.checkpoint.store import CheckpointStore, read_state
from megatron_rl.config.rules import Config


def checkpoint_store(config: Config) -> CheckpointStore:
    """The run's own checkpoints."""
    return CheckpointStore(Path(config.run.dir) / "checkpoints", config.checkpoint.keep)


def latest_checkpoint(config: Config) -> Path | None:
    """The checkpoint that the run continues from, if it has one and may; refused where another trainer wrote it."""
    path = checkpoint_store(config).latest() if config.run.resume else None
    if path is not None and (trainer := read_state(path)["trainer"]) != config.trainer:
        raise ValueError(
            f"run.dir={config.run.dir!r} holds a run of trainer {trainer!r}, not {config.trainer!r}: name another "
            "run.dir, or start over with run.resume=false"
        )
    return path
