"""The loop that every trainer runs in: continue, step, evaluate, log, save, export."""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_rl.checkpoint.hf import write_model
from megatron_rl.checkpoint.store import Role
from megatron_rl.config.load import as_dict, save_config
from megatron_rl.config.rules import Config
from megatron_rl.config.schema import ExpertIterationConfig, GadConfig, GrpoConfig, PpoConfig, SdpoConfig, SftConfig
from megatron_rl.metrics.progress import NOTES, bytes_in, progress
from megatron_rl.metrics.timing import Timer
from megatron_rl.metrics.types import StepLog
from megatron_rl.metrics.writer import Writer
from megatron_rl.models.hf_config import classifier_config
from megatron_rl.parallel.collect import any_rank, from_first_rank
from megatron_rl.parallel.mesh import Mesh, create_mesh, destroy_mesh
from megatron_rl.parallel.stop import StopRequest
from megatron_rl.parallel.watchdog import watch
from megatron_rl.trainers import expert_iteration, gad, grpo, ppo, sdpo, sft
from megatron_rl.trainers.average import AveragedModel
from megatron_rl.trainers.banner import banner
from megatron_rl.trainers.best import WEIGHTS, Best
from megatron_rl.trainers.critic import CriticTrainerConfig, critic_model
from megatron_rl.trainers.data import held_out_prompts
from megatron_rl.trainers.evaluate import Evaluator
from megatron_rl.trainers.guards import Guards
from megatron_rl.trainers.parts import Parts
from megatron_rl.trainers.profile import Profile
from megatron_rl.trainers.resume import checkpoint_store, checkpoint_to_continue, differences, origin
from megatron_rl.types import RolloutGroup
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel

SHOWN_ANSWERS = 8


class Trainer(Protocol):
    """What a trainer brings: its parts, the models it trains and an average, one step, what must be saved of it."""

    parts: Parts
    actor: ModelWorker
    average: WeightAverage | None

    @property
    def critic(self) -> CriticWorker | None: ...

    def roles(self) -> dict[str, Role]: ...

    def step(self, step: int, timer: Timer) -> StepLog: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


def build(config: Config, mesh: Mesh) -> Trainer:
    """The trainer that the config names."""
    if isinstance(config, SftConfig):
        return sft.build(config, mesh)
    if isinstance(config, ExpertIterationConfig):
        return expert_iteration.build(config, mesh)
    if isinstance(config, SdpoConfig):
        return sdpo.build(config, mesh)
    if isinstance(config, GadConfig):
        return gad.build(config, mesh)
    if isinstance(config, PpoConfig):
        return ppo.build(config, mesh)
    assert isinstance(config, GrpoConfig)
    return grpo.build(config, mesh)


def run(config: Config) -> None:
    """Trains from the first step, or from the one after the run directory's latest checkpoint. Collective."""
    layout = asdict(config.parallel)
    mesh = create_mesh(**layout, seed=config.train.seed)
    with StopRequest(announce=mesh.rank == 0 and NOTES not in os.environ) as stop, watch(config.run.hang_timeout_s):
        try:
            trainer = build(config, mesh)
            trainer.parts.workers = [trainer.actor, *([] if trainer.critic is None else [trainer.critic])]
            with closing(trainer.parts):
                Run(config, mesh, trainer, stop).loop()
        finally:
            # Watched too: it may wait for an operation that a lost rank leaves open.
            destroy_mesh()


class Run:
    """One run directory: its checkpoints, logs and exported model."""

    def __init__(self, config: Config, mesh: Mesh, trainer: Trainer, stop: StopRequest) -> None:
        self.config, self.mesh, self.trainer, self.stop = config, mesh, trainer, stop
        self.saved = 0  # the last step that a checkpoint holds
        self.directory = Path(config.run.dir)
        self.store = checkpoint_store(config)
        held_out = held_out_prompts(config, trainer.parts.tokenizer)
        self.evaluator = None
        if held_out is not None:
            self.evaluator = Evaluator(trainer.parts, held_out.all())
        self.averaged = None if trainer.average is None else AveragedModel(config, mesh, trainer.average)
        self.guards = Guards(config)
        self.best = Best(config.checkpoint.best, self.directory)
        self.profile = Profile(config.train.profile, self.directory / "profile", mesh.rank)
        self.timer = Timer()
        for worker in trainer.parts.workers:
            worker.timer = self.timer
        self.writer: Writer | None = None
        self.differences: list[str] = []

    def loop(self) -> None:
        done = self.saved = self._resume()
        last = min(self.config.train.steps, self.config.run.stop_after or self.config.train.steps)
        if dist.get_rank() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.directory / "config.yaml")
            first = done + 1 if done else 0
            self.writer = Writer(
                self.directory,
                self.config.train.steps,
                self.config.trainer,
                first_step=first,
                wandb=self.config.log.wandb,
                config=as_dict(self.config),
            )
            made = self.trainer.actor, self.trainer.critic, self.trainer.average
            print(banner(self.config, self.mesh, *made, done), flush=True)
            for difference in self.differences:
                print(f"{'changed':<14} {difference}", flush=True)
        try:
            if done == 0:
                self._log(0, self._evaluate(0))
            for step in range(done + 1, last + 1):
                if any_rank(self.stop.asked):
                    return self._stop(step - 1)
                self._step(step)
                self.store.poll()
            self._complete()
            # An earlier process may have been killed between its last checkpoint and its export.
            if last == self.config.train.steps and (last > done or not self._exported()):
                self._export_all()
                self._draw(last)
        finally:
            if self.writer is not None:
                self.writer.close()

    def _step(self, step: int) -> None:
        progress.begin(step)
        with self.profile.of_step(step, self.timer), self.timer("step"):
            metrics, histograms, samples = self.trainer.step(step, self.timer)
        if step in self.profile.steps:
            with self._writing(self.profile.directory, "profile"):
                self.profile.write(step)
        seconds = self.timer.metrics()
        self.timer.reset()
        rate = metrics["perf/total_num_tokens"] / seconds["timing_s/step"]
        metrics |= seconds
        metrics |= {
            "perf/time_per_step": seconds["timing_s/step"],
            "perf/tokens_per_second": rate,
            "perf/throughput": rate / self.mesh.world_size,
        }
        final = step == self.config.train.steps
        if self._due(step, self.config.eval.every) or final:
            metrics |= self._evaluate(step)
        self._log(step, metrics, histograms if self._due(step, self.config.log.histograms_every) else {})
        self.guards(step, metrics, samples)
        if self._due(step, self.config.checkpoint.every) or final or step == self.config.run.stop_after:
            self._save(step)

    def _save(self, step: int) -> None:
        state = {"state": self.trainer.state(), "guards": self.guards.state_dict(), "best": self.best.state_dict()}
        with self._writing(self.store.directory, "save_checkpoint"):
            self.store.save(step, self.trainer.roles(), {**origin(self.config), **state})
        self.saved = step

    def _stop(self, step: int) -> None:
        """A signal has asked for it; nothing is lost."""
        if step > self.saved:
            self._save(step)
        self._complete()
        if self.mesh.rank == 0:
            by = self.stop.signal.name if self.stop.signal else "a signal to another rank"
            where = f"after step {step}; checkpoint saved" if step else "before the first step"
            print(f"megatron-rl: stopped by {by} {where}; run the same command to go on", flush=True)

    def _complete(self) -> None:
        """A checkpoint that is being written in the background is waited for."""
        with self._writing(self.store.directory, "save_checkpoint"):
            self.store.complete()

    def _writing(self, directory: Path, phase: str) -> AbstractContextManager[None]:
        """As long as the directory grows, a write is no hang; rank 0 looks for all."""
        return self.timer(phase, (lambda: bytes_in(directory)) if self.mesh.rank == 0 else None)

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _resume(self) -> int:
        """The last step that is already done."""
        path = checkpoint_to_continue(self.config)
        if path is None:
            return 0
        self.differences = differences(path, self.config)
        state = self.store.load(path, self.trainer.roles(), other_roles=self.config.run.allow_changes)
        if self.trainer.average is not None and not {"average", "teacher"} & set(state["models"]):
            self.trainer.average.refresh()
            self.differences.append(f"average: none in {path}, starts from the weights there")
        self.trainer.load_state(state["state"])
        self.guards.load_state_dict(state["guards"])
        self.differences += self.best.load_state_dict(state.get("best"), path.parents[1])
        return int(state["step"])

    def _evaluate(self, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        with self.timer("testing"):
            metrics, answers = self.evaluator(step, self.trainer.actor)
            if self.averaged is not None:
                version = self.averaged.engine_version
                metrics |= self.evaluator(step, self.averaged.now(), name="val_average", version=version)[0]
            if isinstance(self.trainer, gad.GadTrainer):
                metrics |= self.trainer.tell_apart(answers)
        if from_first_rank(self.best.is_beaten_by(metrics)):
            self._export(self.trainer.actor, WEIGHTS)
            self.best.note(step, metrics)
        seconds = self.timer.metrics()
        self.timer.reset()
        if self.writer is not None:
            self.writer.text(step, "val/answers", _table(answers[:SHOWN_ANSWERS]))
        return metrics | seconds

    def _exported(self) -> bool:
        kept = {"hf": True, "hf_average": self.averaged is not None, "hf_critic": self.trainer.critic is not None}
        return all((self.directory / name).is_dir() for name, there in kept.items() if there)

    def _export_all(self) -> None:
        self._export(self.trainer.actor, "hf")
        if self.averaged is not None:
            self._export(self.averaged.now(), "hf_average")
        if self.trainer.critic is not None:
            assert isinstance(self.config, CriticTrainerConfig)
            like = critic_model(self.config).path
            self._export(self.trainer.critic, "hf_critic", like=like, changes=classifier_config(like))

    def _export(
        self, model: ShardedModel, name: str, *, like: str | None = None, changes: Mapping[str, Any] = {}
    ) -> None:
        with self._writing(self.directory / f"{name}.partial", "export"):
            write_model(
                model.named_hf_weights(),
                self.directory / name,
                like=like or self.config.model.path,
                write=dist.get_rank() == 0,
                changes=changes,
            )

    def _draw(self, step: int) -> None:
        """The learning curve, where there is something to draw."""
        # Late: what draws is needed once, at the end.
        from megatron_rl.report.curves import has_curve, plot_learning_curve

        lines = self.directory / "metrics.jsonl"
        if self.writer is not None and has_curve(lines):
            picture = self.directory / "learning_curve.png"
            plot_learning_curve({self.config.trainer: lines}, picture, title=self.directory.name)
            self.writer.image(step, "learning_curve", picture)

    def _log(self, step: int, metrics: dict[str, float], histograms: Mapping[str, Sequence[float]] = {}) -> None:
        if self.writer is not None and metrics:
            self.writer.log(step, metrics, histograms)


def _table(groups: list[RolloutGroup]) -> str:
    """Prompts and answers as a Markdown table, as TensorBoard shows it."""
    lines = ["| prompt | response | reward |", "|---|---|---|"]
    for group in groups:
        cells = (group.prompt.text, group.rollouts[0].text, f"{group.rewards[0].value:g}")
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)
