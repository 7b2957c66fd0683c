"""One evaluation by itself: problems in chunks, each on the disk before the next; then what was found."""

import gc
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rl.checkpoint.store import find_checkpoint, read_state
from megatron_rl.config.load import save_config
from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import PRETRAINED, RANDOM, EvaluationConfig
from megatron_rl.metrics.answering import display
from megatron_rl.metrics.progress import NOTES, progress
from megatron_rl.models.build import weight_map
from megatron_rl.models.hf_config import load_shape
from megatron_rl.parallel.collect import any_rank, from_first_rank
from megatron_rl.parallel.mesh import Mesh, create_mesh, destroy_mesh
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.parallel.watchdog import watch
from megatron_rl.trainers.average import averaged_role
from megatron_rl.trainers.data import problems
from megatron_rl.trainers.evaluate import Evaluator, is_correct
from megatron_rl.trainers.evaluation_files import Record, SampleFile, fingerprint, records, reward_of
from megatron_rl.trainers.evaluation_report import as_markdown, summarize
from megatron_rl.trainers.parts import Parts
from megatron_rl.workers.average import EmptyModel
from megatron_rl.workers.sharded_model import ShardedModel

# Which weights answer, by the name of their figures, and where the answers go.
FILES = {"val": "samples.jsonl", "val_average": "samples_average.jsonl"}


def evaluate(config: EvaluationConfig) -> None:
    """Answers the problems, or goes on with it. Collective.

    Where the checkpoint has an average of the weights, that answers too.
    """
    mesh = create_mesh(**asdict(config.parallel), seed=config.eval.seed)
    announces = mesh.rank == 0 and NOTES not in os.environ
    with StopRequest(announce=announces) as stop, watch(config.run.hang_timeout_s):
        try:
            with closing(Parts(config)) as parts:
                Evaluation(config, mesh, parts, stop).run()
        finally:
            destroy_mesh()


class Evaluation:
    """One directory of answers."""

    def __init__(self, config: EvaluationConfig, mesh: Mesh, parts: Parts, stop: StopRequest) -> None:
        self.config, self.mesh, self.parts, self.stop = config, mesh, parts, stop
        self.directory = Path(config.run.dir)
        named = config.model.weights not in (PRETRAINED, RANDOM)
        self.checkpoint = find_checkpoint(config.model.weights) if named else None
        self.step = int(read_state(self.checkpoint)["step"]) if self.checkpoint else 0
        self.evaluator = Evaluator(parts, problems(config, parts.tokenizer).all())

    def run(self) -> None:
        average = averaged_role(self.checkpoint) if self.checkpoint else None
        roles = {"val": "actor", **({"val_average": average} if average else {})}
        found: dict[str, list[Record]] = {}
        for version, (name, role) in enumerate(roles.items()):
            self._push(role, version)
            file = SampleFile(self.directory / FILES[name], 1 + self.config.eval.samples)
            done = self._answer(name, file, self._open(file))
            if done < len(self.evaluator.prompts):
                self._say_stopped(done)
                return
            found[name] = file.read() if self.mesh.rank == 0 else []
        if self.mesh.rank == 0:
            self._report(found)

    def _push(self, role: str, version: int) -> None:
        """The weights go to the engine; Megatron's copy of them is gone when this returns."""
        with progress.phase("sync"):
            if self.checkpoint is None:
                model = ShardedModel(self.config.model, self.mesh)
            else:
                model = EmptyModel(self.config.model, self.mesh)
                model.load_checkpoint(self.checkpoint, role)
            self.parts.push(model, version)
        del model
        gc.collect()

    def _open(self, file: SampleFile) -> int:
        """How many problems the file has answers to, on every rank; so is the error where they are others."""
        done: int | str = 0
        if self.mesh.rank == 0:
            names = weight_map(load_shape(self.config.model.path)).hf_names()
            weights = self.parts.engine.checksums(names)
            total = len(self.evaluator.prompts)
            try:
                done = file.open(
                    fingerprint(self.config, weights, self.evaluator.prompts, self.step),
                    resume=self.config.run.resume,
                    problems=total,
                    chunk=self.config.eval.chunk,
                )
                save_config(self.config, self.directory / "config.yaml")
            except ConfigError as error:
                done = str(error)
        done = from_first_rank(done)
        if isinstance(done, str):
            raise ConfigError(done)
        return done

    def _answer(self, name: str, file: SampleFile, done: int) -> int:
        """The problems that are answered when this ends: all, unless a signal asked for less."""
        total, first = len(self.evaluator.prompts), self.mesh.rank == 0
        right = self._right(file.read()) if first else 0
        with ExitStack() as stack:
            stack.enter_context(progress.phase("testing"))
            shown = stack.enter_context(closing(display(total, name))) if first else None
            while done < total and not any_rank(self.stop.asked):
                end = min(done + self.config.eval.chunk, total)
                lines = records(*self.evaluator.answer(self.step, done, end))
                done = end
                if shown is not None:
                    file.append(lines)
                    right += self._right(lines)
                    shown.show(done, right / done)
        return done

    @staticmethod
    def _right(lines: Sequence[Record]) -> int:
        return sum(is_correct(reward_of(line)) for line in lines if line["draw"] == "greedy")

    def _say_stopped(self, done: int) -> None:
        if self.mesh.rank == 0:
            by = self.stop.signal.name if self.stop.signal else "a signal to another rank"
            total = len(self.evaluator.prompts)
            where = f"after {done} of {total} problems"
            print(f"megatron-rl: stopped by {by} {where}; run the same command to go on", flush=True)

    def _report(self, found: dict[str, list[Record]]) -> None:
        """Prints what was found, and writes it."""
        summary: dict[str, Any] = {
            "weights": str(self.checkpoint or f"{self.config.model.path} ({self.config.model.weights})"),
            "step": self.step,
            "data": self.config.data.val,
            "shots": self.config.eval.shots,
            **{name: summarize(lines, self.config.eval.samples, name) for name, lines in found.items()},
        }
        text = as_markdown(summary)
        (self.directory / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        (self.directory / "summary.md").write_text(text, encoding="utf-8")
        print(text)
        print(f"answers in {self.directory}", flush=True)
