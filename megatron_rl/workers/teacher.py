"""The teacher of self-distillation: whose weights read the response, and when they move."""

from collections.abc import Sequence
from typing import Any

from megatron_rl.config.schema import ModelConfig
from megatron_rl.config.sdpo import TeacherConfig, TeacherMode, TeacherUpdate
from megatron_rl.data.planner import StepPlan, replan
from megatron_rl.data.samples import Sample
from megatron_rl.workers.average import WeightAverage, decay_of
from megatron_rl.workers.distillation import Targets
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.sharded_model import ShardedModel


class Teacher:
    """`ema`: an average of the actor's weights, which starts as a copy. `frozen`: the model that training starts from.

    `live`: the actor itself. `trust_region`: the first model, its logits mixed with the actor's by `rate`.

    With `refresh_every`, an average or a frozen model becomes a copy of the actor after so many rollout batches. Such a
    frozen model is an average that is never updated otherwise.
    """

    def __init__(self, model: ModelConfig, config: TeacherConfig, actor: ModelWorker) -> None:
        self.config, self.actor = config, actor
        self.model: ShardedModel = actor if config.mode is TeacherMode.live else ShardedModel(model, actor.mesh)
        self.average: WeightAverage | None = None
        self.batches = 0  # rollout batches in which the actor moved
        if config.mode is TeacherMode.ema or config.refresh_every:
            self.average = WeightAverage(actor, decay_of(config), offload=config.offload, model=self.model)

    @property
    def mixes(self) -> bool:
        """Whether the actor's own reading of the teacher's prompt counts too."""
        return self.config.mode is TeacherMode.trust_region

    def targets(self, samples: Sequence[Sample], plan: StepPlan, max_tokens: int) -> tuple[Targets, Targets | None]:
        """What the teacher, and where it is mixed in the actor, make of the samples; `plan` is the student's.

        `samples` hold the teacher's prompts, and the responses of the student's samples with the same loss masks.
        """
        mesh = self.actor.mesh
        replanned = replan(
            [len(sample) for sample in samples],
            plan,
            max_tokens=max_tokens,
            min_micro_batches=mesh.min_micro_batches,
            multiple_of=mesh.micro_batch_multiple,
        )
        models = [self.model, self.actor] if self.mixes else [self.model]
        read = [Targets(model.final_hidden(samples, replanned), model.models[-1].head_weight) for model in models]
        return read[0], read[1] if self.mixes else None

    def after_step(self) -> dict[str, float]:
        """An optimizer step was applied. Collective."""
        return self._move(TeacherUpdate.step)

    def after_batch(self) -> dict[str, float]:
        """A rollout batch is over, in which the actor moved. Collective."""
        self.batches += 1
        if self.config.refresh_every and self.batches % self.config.refresh_every == 0:
            assert self.average is not None
            self.average.refresh()
            return self._figures(0.0)
        return self._move(TeacherUpdate.rollout)

    def _move(self, when: TeacherUpdate) -> dict[str, float]:
        """An averaged teacher's update towards the actor, if this is the time for it."""
        if self.average is None or self.config.mode is not TeacherMode.ema or self.config.every is not when:
            return {}
        return self._figures(self.average.update())

    def _figures(self, decay: float) -> dict[str, float]:
        assert self.average is not None
        return {"teacher/decay": decay, "teacher/updates": float(self.average.num_updates)}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with; what the teacher keeps, by its mode, is part of it."""
        refreshed = self.config.mode is TeacherMode.frozen and self.average is not None
        return {**self.model.identity(), "mode": "refreshed" if refreshed else self.config.mode.value}

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        """The average, in float32; of a model that stays frozen its weights."""
        return {**(self.average or self.model).sharded_state(loading=loading), "batches": self.batches}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what `sharded_state` gave out."""
        self.batches = state["batches"]
        (self.average or self.model).load_state(state)
