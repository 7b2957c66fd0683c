"""The best evaluation of a run so far, whose weights are kept beside those of the last step."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config.rules import ConfigError
from megatron_rl.parallel.collect import from_first_rank

WEIGHTS, RECORD = "hf_best", "best.json"


class Best:
    """Which step had the largest value of the figure that `checkpoint.best` names.

    The weights lie in `hf_best` of the run directory, and `best.json` says which they are.
    """

    def __init__(self, figure: str | None, directory: Path) -> None:
        self.figure, self.directory = figure, directory
        self.record: dict[str, Any] | None = None  # step, figure, value

    def is_beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these figures of an evaluation are better; a NaN never is."""
        if self.figure is None:
            return False
        if self.figure not in metrics:
            there = ", ".join(sorted(name for name in metrics if name.startswith("val/")))
            raise ConfigError(f"checkpoint.best={self.figure!r} is no figure of this run's evaluations: {there}")
        value = metrics[self.figure]
        return value > self.record["value"] if self.record is not None else value == value

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """After the weights of this step have been written."""
        assert self.figure is not None
        self.record = {"step": step, "figure": self.figure, "value": metrics[self.figure]}
        if dist.get_rank() == 0:
            partial = self.directory / f"{RECORD}.partial"
            partial.write_text(json.dumps(self.record) + "\n")
            os.replace(partial, self.directory / RECORD)

    def state_dict(self) -> dict[str, Any] | None:
        """What a continued run must remember."""
        return self.record

    def load_state_dict(self, state: Mapping[str, Any] | None, origin: Path) -> list[str]:
        """Goes on from `state_dict`, saved by the run in `origin`; says so where the best weights cannot be had.

        Those in the run directory may be of a later step than the checkpoint: that step is taken again. Collective.
        """
        if self.figure is None:
            return []
        self.record = None
        if state is None or state["figure"] != self.figure:
            return [f"checkpoint.best: nothing is known of {self.figure} before this step"]
        held = dist.get_rank() == 0 and ((self.directory / WEIGHTS).is_dir() or self._copied(origin, state))
        if not from_first_rank(held):
            return [f"checkpoint.best: the weights of step {state['step']} are gone, a later best is kept"]
        self.record = dict(state)
        return []

    def _copied(self, origin: Path, state: Mapping[str, Any]) -> bool:
        """Takes the weights over from another run directory, if it still has those of this state."""
        record = origin / RECORD
        if not (origin / WEIGHTS).is_dir() or not record.is_file() or json.loads(record.read_text()) != state:
            return False
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = self.directory / f"{WEIGHTS}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(origin / WEIGHTS, partial)
        partial.rename(self.directory / WEIGHTS)
        shutil.copy2(record, self.directory / RECORD)
        return True
