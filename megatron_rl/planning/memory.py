"""From a config to the bytes of each rank: what is held between steps, and the moments in which most is added."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import (
    DType,
    EngineName,
    ExpertIterationConfig,
    GrpoConfig,
    KLPlace,
    PolicyConfig,
    PolicyGradientConfig,
    RolloutTrainerConfig,
    SdpoConfig,
    SftConfig,
)
from megatron_rl.config.sdpo import Support, TeacherMode
from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.activations import Build, Pass
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.parameters import FLOAT32, frozen_model, trained_model, vocabulary_rows
from megatron_rl.planning.rollouts import engine_on_rank
from megatron_rl.planning.saving import SaveBytes, saved_frozen, saved_model
from megatron_rl.planning.update import update_moments
from megatron_rl.planning.vocabulary import teacher_head_bytes

WIDTHS = {DType.float32: FLOAT32, DType.bfloat16: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A config on a number of ranks, with the shapes of its models."""

    config: Config
    actor: ModelShape
    critic: ModelShape | None = None
    layout: Layout
    build: Build = Build.te

    @property
    def width(self) -> int:
        return WIDTHS[self.config.model.dtype]

    @property
    def world(self) -> int:
        return self.layout.tp * self.layout.pp * self.layout.dp


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes on one rank of a stage. What a moment gives back is negative in it."""

    stage: int
    held: dict[str, int] = field(default_factory=dict)
    moments: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)  # in the host's memory

    @property
    def between_steps(self) -> int:
        return sum(self.held.values())

    def at(self, moment: str) -> int:
        """All there is in a moment."""
        return self.between_steps + sum(self.moments[moment].values())

    @property
    def fullest(self) -> str:
        """The moment with most in memory."""
        return max(self.moments, key=self.at)

    @property
    def peak(self) -> int:
        return self.at(self.fullest)


def samples_per_update(config: Config) -> int:
    """Sequences of one optimizer step, over all ranks."""
    if not isinstance(config, RolloutTrainerConfig):
        return config.train.batch_size
    sequences = config.train.batch_size * config.rollout.group_size
    return max(sequences // config.train.mini_batches_per_step, 1)


def longest_sample(config: Config) -> int:
    """Tokens of the longest sequence to learn from; only a micro-batch limits a demonstration."""
    if not isinstance(config, RolloutTrainerConfig):
        return config.train.max_tokens_per_micro_batch
    return config.data.max_prompt_tokens + config.rollout.max_new_tokens


def micro_batch_tokens(config: Config, dp: int) -> int:
    """Tokens of the fullest micro-batch that can come: the limit, or all that a rank has of an update."""
    whole = -(-samples_per_update(config) // dp) * longest_sample(config)
    return min(config.train.max_tokens_per_micro_batch, whole)


def footprint(case: Case, stage: int, micro_batches: int) -> Footprint:
    """The bytes on a rank of `stage`, every number at its largest: full micro-batches, longest answers."""
    return Footprint(
        stage=stage,
        held=dict(_held(case, stage)),
        moments=dict(_moments(case, stage, micro_batches)),
        host=_on_host(case, stage),
    )


def keeps_average(config: Config) -> bool:
    """Whether an average of the weights is kept, on its own or as a teacher."""
    if isinstance(config, SdpoConfig):
        return config.teacher.mode is TeacherMode.ema or bool(config.teacher.refresh_every)
    return isinstance(config, SftConfig | ExpertIterationConfig | GrpoConfig) and config.average.enabled


def has_reference(config: Config) -> bool:
    """Whether the first policy is kept to be compared with."""
    return isinstance(config, PolicyGradientConfig) and config.kl.where is not KLPlace.none


def has_teacher(config: Config) -> bool:
    """Whether a teacher's weights are kept beside the policy's."""
    return isinstance(config, SdpoConfig) and config.teacher.mode is not TeacherMode.live


def _is_offloaded(config: Config) -> bool:
    if isinstance(config, SdpoConfig):
        return config.teacher.offload
    return isinstance(config, SftConfig | ExpertIterationConfig | GrpoConfig) and config.average.offload


def _sleeps(config: Config) -> bool:
    return config.rollout.engine is EngineName.vllm and config.rollout.vllm.sleep


def _held(case: Case, stage: int) -> Iterator[tuple[str, int]]:
    """By what it is for. A model that an average is evaluated or read as counts from the first step on."""
    config, layout, width = case.config, case.layout, case.width
    actor, frozen = trained_model(case.actor, layout, stage, width), frozen_model(case.actor, layout, stage, width)
    yield "weights", actor.weights
    yield "gradients", actor.gradients
    yield "optimizer", actor.optimizer
    if keeps_average(config):
        # A teacher in float32 is the average.
        if not _is_offloaded(config) and not (isinstance(config, SdpoConfig) and width == FLOAT32):
            yield "average of the weights", actor.average
        if not isinstance(config, SdpoConfig):
            yield "model of the average", frozen.weights
    if has_teacher(config):
        yield "teacher", frozen.weights
    if has_reference(config):
        yield "reference", frozen.weights
    if case.critic is not None:
        critic = trained_model(case.critic, layout, stage, width)
        yield "critic: weights", critic.weights
        yield "critic: gradients", critic.gradients
        yield "critic: optimizer", critic.optimizer
    engine = engine_on_rank(config, case.actor, width, case.world)
    if engine.weights and not _sleeps(config):
        yield "engine: weights", engine.weights
        if engine.stays:
            yield "engine: keys and values", engine.keys_values


def _moments(case: Case, stage: int, micro_batches: int) -> Iterator[tuple[str, dict[str, int]]]:
    config, layout, width = case.config, case.layout, case.width
    tokens = micro_batch_tokens(config, layout.dp)
    bonus = isinstance(config, PolicyConfig) and config.algorithm.entropy_coeff != 0
    at = Pass(shape=case.actor, layout=layout, build=case.build, width=width, tokens=tokens)
    for name, added in update_moments(at, stage, micro_batches, tokens, entropy_bonus=bonus).items():
        if isinstance(config, SdpoConfig) and stage == layout.pp - 1:
            added = added | _distilled(case, config, tokens, in_the_loss=name == "the loss")
        yield f"update, {name}", added
    if case.critic is not None:
        at = Pass(shape=case.critic, layout=layout, build=case.build, width=width, tokens=tokens)
        for name, added in update_moments(at, stage, micro_batches, tokens).items():
            yield f"critic's update, {name}", added
    trained = trained_model(case.actor, layout, stage, width)
    if keeps_average(config) and trained.gathered:
        yield "the average's way to its model", {"gathered shares": trained.gathered}
    save = _save(case, stage)
    yield "a save", {"gathered shares": save.device if case.build is Build.te else save.host}
    yield from _rollouts(case, stage)


def _save(case: Case, stage: int) -> SaveBytes:
    """Of all roles of a checkpoint: what the run trains, an average, and models that stay as they are."""
    config, background = case.config, case.config.checkpoint.background
    where = (case.layout, stage, case.width, case.build)
    total = saved_model(case.actor, *where, average=keeps_average(config), background=background)
    if case.critic is not None:
        total += saved_model(case.critic, *where, average=False, background=background)
    if has_reference(config) or (has_teacher(config) and not keeps_average(config)):
        total += saved_frozen(case.actor, *where, background=background)
    return total


def _rollouts(case: Case, stage: int) -> Iterator[tuple[str, dict[str, int]]]:
    """The weights' way to the engine, one whole tensor at a time and its shards; and the rollouts themselves.

    With `rollout.vllm.sleep` the engine wakes for its weights, and the trainer gives back afterwards.
    """
    config = case.config
    engine = engine_on_rank(config, case.actor, case.width, case.world)
    tensor = 2 * case.width * case.actor.vocab_size * case.actor.hidden_size
    awake = {"engine: weights": engine.weights, "engine: keys and values": engine.keys_values}
    if config.rollout.engine is EngineName.vllm_server:
        yield "weights to the engine", {"tensors": tensor}
    elif engine.weights:
        yield "weights to the engine", {"tensors": tensor, **(awake if _sleeps(config) else {})}
        if _sleeps(config):
            yield "rollouts", awake | _given_back(case, stage)
        elif not engine.stays:
            yield "rollouts", {"engine: keys and values": engine.keys_values, "engine: a draw": engine.drawing}


def _given_back(case: Case, stage: int) -> dict[str, int]:
    """Gradients, and Adam's numbers where they are no views of float32 weights (ModelWorker.give_back)."""
    models = {"": case.actor, "critic: ": case.critic}
    back = {}
    for prefix, shape in models.items():
        if shape is not None:
            held = trained_model(shape, case.layout, stage, case.width)
            back[f"{prefix}gradients"] = -held.gradients
            back[f"{prefix}optimizer"] = -held.optimizer if case.width < FLOAT32 else 0
    return back


def _distilled(case: Case, config: SdpoConfig, tokens: int, *, in_the_loss: bool) -> dict[str, int]:
    """The teacher's hidden states of the mini-batch's responses, twice where it is mixed; in the loss its head too."""
    mixes = config.teacher.mode is TeacherMode.trust_region
    responses = -(-samples_per_update(config) // case.layout.dp) * config.rollout.max_new_tokens
    added = {"teacher's hidden states": (1 + mixes) * case.width * responses * case.actor.hidden_size}
    if in_the_loss:
        added["teacher's lm-head"] = teacher_head_bytes(
            tokens,
            case.actor.hidden_size,
            vocabulary_rows(case.actor, case.layout),
            case.width,
            case.build,
            listed=min(config.distill.topk, case.actor.vocab_size),
            full=config.distill.support is Support.full,
            mixed=mixes,
        )
    return added


def _on_host(case: Case, stage: int) -> dict[str, int]:
    """While a checkpoint is written, and what is offloaded; on a CPU all memory is the host's."""
    config = case.config
    host = {}
    if case.build is Build.te:
        host["a save"] = _save(case, stage).host
    if keeps_average(config) and _is_offloaded(config):
        host["average of the weights"] = trained_model(case.actor, case.layout, stage, case.width).average
    if _sleeps(config):
        engine = engine_on_rank(config, case.actor, case.width, case.world)
        given = -sum(size for part, size in _given_back(case, stage).items() if part.endswith("optimizer"))
        host["whoever sleeps"] = max(engine.weights, given)
    return host
