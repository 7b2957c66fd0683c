"""What an evaluation leaves in its directory while it runs, so that the same command goes on where it stopped.

samples.jsonl        one line per sample, problem by problem: the greedy answer, then the draws
fingerprints.json    of each file of samples: weights, problems and options that they come from
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import EvaluationConfig
from megatron_rl.types import Prompt, Reward, RolloutGroup

Record = dict[str, Any]
FINGERPRINTS = "fingerprints.json"


def records(greedy: Sequence[RolloutGroup], drawn: Sequence[RolloutGroup]) -> list[Record]:
    """The lines of some problems, in their order."""
    lines = []
    for place, group in enumerate(greedy):
        lines.append(_record(group, 0, "greedy"))
        if drawn:
            lines += [_record(drawn[place], number, number) for number in range(len(drawn[place].rollouts))]
    return lines


def _record(group: RolloutGroup, place: int, draw: str | int) -> Record:
    rollout, reward = group.rollouts[place], group.rewards[place]
    return {
        "problem": group.prompt.index,
        "draw": draw,
        "prompt": group.prompt.text,
        "response": rollout.text,
        "reward": reward.value if reward.reason is None else None,
        "parts": {name: value if math.isfinite(value) else None for name, value in reward.parts.items()},
        "reason": reward.reason,
        "feedback": reward.feedback,
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.token_ids),
    }


def reward_of(record: Record) -> Reward:
    """The reward that a line holds."""
    value = math.nan if record["reward"] is None else record["reward"]
    parts = {name: math.nan if part is None else part for name, part in record["parts"].items()}
    return Reward(value=value, parts=parts, reason=record["reason"], feedback=record["feedback"])


def fingerprint(
    config: EvaluationConfig, weights: Mapping[str, int], prompts: Sequence[Prompt], step: int
) -> dict[str, Any]:
    """What samples depend on. `weights` are the checksums of the engine's tensors, `step` numbers the random stream."""
    asked = [(prompt.index, prompt.token_ids, dict(prompt.row)) for prompt in prompts]
    found: dict[str, Any] = {
        "weights": _digest(sorted(weights.items())),
        "problems": _digest(asked),
        "step": step,
        "eval.samples": config.eval.samples,
        "eval.max_new_tokens": config.eval.max_new_tokens or config.rollout.max_new_tokens,
        "rollout.stop": list(config.rollout.stop),
        "reward.name": config.reward.name,
        "reward.options": _digest(config.reward.options),
    }
    if config.eval.samples:
        drawn = {name: getattr(config.rollout, name) for name in ("temperature", "top_p", "top_k")}
        found |= {"eval.seed": config.eval.seed, **{f"rollout.{name}": value for name, value in drawn.items()}}
    return found


def _digest(value: object) -> str:
    """Of plain values: what a row of a parquet file holds beside those of JSON is told by its text."""
    return hashlib.sha256(json.dumps(value, skipkeys=True, default=str).encode()).hexdigest()[:16]


class SampleFile:
    """The samples of one model. One process writes it."""

    def __init__(self, path: Path, lines_per_problem: int) -> None:
        self.path, self.lines_per_problem = path, lines_per_problem

    def open(self, wanted: Mapping[str, Any], *, resume: bool, problems: int, chunk: int) -> int:
        """How many of the problems are answered already; whole chunks of them stay in the file, and nothing else.

        ConfigError where the samples there are those of another evaluation.
        """
        notes = self.path.with_name(FINGERPRINTS)
        held: dict[str, Any] = json.loads(notes.read_text()) if notes.is_file() else {}
        lines = self._lines() if resume else []
        if lines and (others := differences(held.get(self.path.name, {}), wanted)):
            raise ConfigError(
                f"{self.path} holds the answers of another evaluation ({'; '.join(others)}): name another run.dir, "
                "or start over with run.resume=false"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        done = len(lines) // self.lines_per_problem
        kept = done if done == problems else done - done % chunk
        # Also where only a torn line goes.
        _replace(self.path, "".join(lines[: kept * self.lines_per_problem]))
        _replace(notes, json.dumps(held | {self.path.name: dict(wanted)}, indent=1) + "\n")
        return kept

    def append(self, lines: Sequence[Record]) -> None:
        """Once it returns, the disk holds them."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Record]:
        return [json.loads(line) for line in self._lines()]

    def _lines(self) -> list[str]:
        """A line without its newline is what a killed process left: it does not count."""
        if not self.path.exists():
            return []
        whole = self.path.read_bytes().rpartition(b"\n")[0]
        return [line.decode("utf-8") + "\n" for line in whole.split(b"\n")] if whole else []


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs, in words."""
    found = []
    for key in sorted(held.keys() | wanted.keys()):
        before, now = held.get(key), wanted.get(key)
        if before != now:
            plain = key in ("weights", "problems", "reward.options")
            found.append(f"other {key}" if plain else f"{key} is {before!r} there and {now!r} here")
    return found


def _replace(path: Path, text: str) -> None:
    """Writes the file anew, whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
