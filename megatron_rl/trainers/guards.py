"""What watches a run while it goes: alarms on the terminal and in the run directory, and an end where one must be."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import GadConfig, KLEstimator, PolicyGradientConfig, RolloutTrainerConfig
from megatron_rl.metrics.rules import Action, Rule, chosen_rules
from megatron_rl.metrics.watch import Alarm, Watch
from megatron_rl.metrics.writer import drop_from
from megatron_rl.parallel.collect import from_first_rank
from megatron_rl.types import RunError


class GuardError(RunError):
    """A guard that stops runs has fired."""


def rules_of(config: Config) -> list[Rule]:
    """The table as the config has it; ValueError on a name that is no rule."""
    guards, tolerance = config.guards, config.rollout.parity_tolerance
    assert tolerance is not None
    return chosen_rules(
        ignore=guards.ignore,
        stop=guards.stop,
        limits=guards.limits,
        parity_tolerance=tolerance,
        max_skipped_steps=guards.max_skipped_steps,
        signed_kl=isinstance(config, PolicyGradientConfig) and config.kl.estimator is KLEstimator.k1,
        moving_rewards=isinstance(config, GadConfig),
        own_answers=isinstance(config, RolloutTrainerConfig),
    )


class Guards:
    """The rules of one run. Called after every step, with its figures and the records of its samples."""

    def __init__(self, config: Config) -> None:
        self.directory = Path(config.run.dir)
        self.watch = Watch(rules_of(config))
        self.started = False

    def __call__(self, step: int, figures: Mapping[str, float], samples: Sequence[Mapping[str, Any]]) -> None:
        """Says and writes what the step's figures give cause for; raises GuardError, on all ranks alike. Collective."""
        alarms = self.watch(step, figures)
        if dist.get_rank() == 0:
            self._write(step, alarms, samples)
        # The figures are the same on every rank. Should a rounding make them differ, rank 0's word ends or goes on.
        reasons = from_first_rank([alarm.message for alarm in alarms if alarm.rule.action is Action.stop])
        if reasons:
            raise GuardError("; ".join(reasons))

    def state_dict(self) -> dict[str, Any]:
        """What a continued run must remember."""
        return self.watch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict`."""
        self.watch.load_state_dict(state)

    def _write(self, step: int, alarms: Sequence[Alarm], samples: Sequence[Mapping[str, Any]]) -> None:
        path = self.directory / "alarms.jsonl"
        if not self.started:
            drop_from(path, step)  # what an earlier process wrote of steps that are taken again
            self.started = True
        for alarm in alarms:
            row: dict[str, Any] = {
                "step": step,
                "rule": alarm.rule.name,
                "figure": alarm.figure,
                "value": alarm.value,
                "threshold": alarm.threshold,
                "action": alarm.rule.action.value,
                "message": alarm.message,
            }
            said = "error" if alarm.rule.action is Action.stop else "warning"
            message = alarm.message
            if alarm.rule.keep_samples and samples:
                row["samples"] = f"samples_{step:08d}.json"
                message += f". The step's samples are in {row['samples']}"
                (self.directory / row["samples"]).write_text(json.dumps(list(samples), allow_nan=False) + "\n")
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row, allow_nan=False) + "\n")
            print(f"megatron-rl: {said}: {message}", file=sys.stderr, flush=True)
