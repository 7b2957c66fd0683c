"""The average of the weights that a run may keep, its updates, and the model that it is evaluated and exported as."""

from functools import cached_property
from pathlib import Path

from megatron_rl.checkpoint.store import read_state
from megatron_rl.config.rules import Config
from megatron_rl.config.schema import GrpoConfig, LikelihoodConfig
from megatron_rl.config.sdpo import TeacherMode
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.workers.average import EmptyModel, WeightAverage, decay_of
from megatron_rl.workers.model_worker import ModelWorker, StepResult


def kept_average(config: LikelihoodConfig | GrpoConfig, actor: ModelWorker) -> WeightAverage | None:
    """The actor's average, where one is kept."""
    options = config.average
    return WeightAverage(actor, decay_of(options), offload=options.offload) if options.enabled else None


def averaged_role(checkpoint: Path) -> str | None:
    """The role that is an average in a checkpoint, where there is one: of a teacher its mode says so."""
    models = read_state(checkpoint)["models"]
    if "average" in models:
        return "average"
    return "teacher" if models.get("teacher", {}).get("mode") == TeacherMode.ema.value else None


def take_step(actor: ModelWorker, average: WeightAverage | None) -> StepResult:
    """The optimizer's step, and the average's update, unless the step was skipped."""
    result = actor.step()
    if average is not None and result.applied:
        with actor.timer("average"):
            average.update()
    return result


class AveragedModel:
    """The average as a model, made when it is first asked for."""

    def __init__(self, config: Config, mesh: Mesh, average: WeightAverage) -> None:
        self.config, self.mesh, self.average = config, mesh, average

    @cached_property
    def _model(self) -> EmptyModel:
        return EmptyModel(self.config.model, self.mesh)

    def now(self) -> EmptyModel:
        """With the present average. Collective."""
        self.average.write_to(self._model)
        return self._model

    @property
    def engine_version(self) -> int:
        """Of the average in an engine: never one that the actor has, nor that of an engine without weights, -1."""
        return -2 - self.average.num_updates
