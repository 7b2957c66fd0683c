"""The invariance certificate: does the way a batch is cut change the loss, or any gradient?

A tiny model of the config's own family takes one update's gradient with the config's own objective: once on one rank,
all sequences in one micro-batch, and then under every layout that the present ranks can form, and every other way to
cut, order and stream the batch. Nothing may differ by more than rounding.
"""

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import (
    RANDOM,
    GadConfig,
    LikelihoodConfig,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    PolicyGradientConfig,
    PpoConfig,
    SdpoConfig,
)
from megatron_rl.config.sdpo import TeacherMode
from megatron_rl.data.planner import StepPlan
from megatron_rl.data.samples import Sample, from_example, weighed
from megatron_rl.models.hf_config import load_config, load_shape
from megatron_rl.parallel.collect import any_rank
from megatron_rl.parallel.device import device
from megatron_rl.parallel.mesh import Mesh, create_mesh, destroy_mesh, join_world
from megatron_rl.trainers.likelihood import weighed_by
from megatron_rl.trainers.objectives import policy_objective
from megatron_rl.trainers.sdpo import distillation, with_weights
from megatron_rl.workers.critic import CriticWorker, Reading, ValueRegression, WeighedValues
from megatron_rl.workers.distillation import Targets
from megatron_rl.workers.model_worker import ModelWorker
from megatron_rl.workers.objective import NegativeLogLikelihood, Objective

# Eight heads and four layers can be cut four ways along either axis; a vocabulary of 99 by no number of ranks.
TINY: dict[str, int] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 99,
    "max_position_embeddings": 128,
}
TINY_EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SEQUENCES = 13
WIDE, NARROW = 4096, 48  # tokens per micro-batch: everything together, and a few sequences at a time
TOLERANCE = 1e-5  # relative, in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """One way to compute the same gradient. `alone`: one sequence per micro-batch; `chunk`: columns of the lm-head."""

    name: str
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_tokens: int = NARROW
    alone: bool = False
    backwards: bool = False
    chunk: int = 1024


class Gradient(NamedTuple):
    loss: float
    named: dict[str, Tensor]


class Difference(NamedTuple):
    """Relative to the largest entry of each tensor; `worst` names the parameter of the largest one.

    Of the loss: relative to itself, or to the gradient's largest entry where that is more. Advantages of both signs can
    add up to almost nothing, of which the rounding of their terms is a large part.
    """

    loss: float
    gradient: float
    worst: str


def cuts(world: int, *, experts: bool = False) -> Iterator[Cut]:
    """Every layout of `world` ranks (data-parallel ranks fill up), then ways to cut the batch on all of them.

    With `experts` tensor parallelism is always sequence-parallel, and each layout is cut for the experts in every way.
    """
    sizes = [n for n in range(1, world + 1) if world % n == 0]
    for tp in sizes:
        for pp in (n for n in sizes if tp * n <= world and world % (tp * n) == 0):
            name = " ".join(f"{axis}{n}" for axis, n in (("tp", tp), ("pp", pp), ("dp", world // (tp * pp))) if n > 1)
            layout: dict[str, Any] = {"tp": tp, "pp": pp}
            parallel = layout | {"sequence_parallel": tp > 1}
            if not experts or tp == 1:
                yield Cut(name=name or "one rank", layout=layout)
            if tp > 1:
                yield Cut(name=f"{name} sequence_parallel", layout=parallel)
            if pp == 2:
                yield Cut(name=f"{name} vpp2", layout=(parallel if experts else layout) | {"vpp": 2})
            for ep, etp in _of_experts(world // pp) if experts else ():
                yield Cut(name=f"{name} ep{ep} etp{etp}", layout=parallel | {"ep": ep, "etp": etp})
    yield Cut(name="one micro-batch per rank", max_tokens=WIDE)
    yield Cut(name="one sequence per micro-batch", alone=True)
    yield Cut(name="sequences backwards", backwards=True)
    yield Cut(name="vocabulary in chunks of 7", chunk=7)
    yield Cut(name="recompute", layout={"recompute": True})


def _of_experts(ranks: int) -> Iterator[tuple[int, int]]:
    """Ways to cut experts over the ranks of a stage, beside leaving them whole: (ep, etp)."""
    for ep, etp in itertools.product((n for n in range(1, ranks + 1) if ranks % n == 0), repeat=2):
        if ep * etp > 1 and ranks % (ep * etp) == 0:
            yield ep, etp


def tiny_directory(model_path: str, directory: Path) -> None:
    """A config of the same family, biases, norms, tying and rotary embedding, with the sizes of TINY."""
    config = load_config(model_path)
    mixture = {name: value for name, value in TINY_EXPERTS.items() if hasattr(config, name)}
    for name, value in (TINY | mixture).items():
        setattr(config, name, value)
    # Where the family derives one entry per layer, it is to be derived again.
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * TINY["num_hidden_layers"]
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    config.save_pretrained(directory)


def objective_of(config: Config, worker: ModelWorker) -> Objective:
    """What the config's trainer would minimise, with the proximal policy told apart from the current one.

    A teacher's hidden states are drawn at random by sample; its head is the worker's own.
    """
    if isinstance(config, LikelihoodConfig):
        return NegativeLogLikelihood()
    if isinstance(config, SdpoConfig):
        targets, other = (
            Targets(_Drawn(seed, worker.shape.hidden_size), worker.models[-1].head_weight) for seed in (1, 2)
        )
        mixed = other if config.teacher.mode is TeacherMode.trust_region else None
        return distillation(config, targets, mixed, vocab_size=worker.shape.vocab_size, on_policy=False)
    assert isinstance(config, PolicyGradientConfig)
    return dataclasses.replace(policy_objective(config), on_policy=False)


class _Drawn(Mapping[int, Tensor]):
    """Hidden states for the loss-bearing tokens of any sample of `make_samples`."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.counts = {sample.id: int(sample.loss_mask.sum()) for sample in make_sequences()}

    def __getitem__(self, sample_id: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + sample_id)
        return torch.randn(self.counts[sample_id], self.size, generator=generator).to(device())

    def __iter__(self) -> Iterator[int]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)


def make_sequences() -> list[Sample]:
    """Sequences of mixed length, some tokens masked, one response without any."""
    draw = torch.Generator().manual_seed(3)
    samples = []
    for number in range(SEQUENCES):
        prompt, response = (int(torch.randint(1, high, (), generator=draw)) for high in (9, 14))
        tokens = torch.randint(1, TINY["vocab_size"], (prompt + response,), generator=draw).tolist()
        sample = from_example(number, tokens[:prompt], tokens[prompt:])
        mask = torch.rand(response, generator=draw) > 0.2
        samples.append(dataclasses.replace(sample, loss_mask=mask & (number != 4)))
    return samples


def make_samples(config: Config, objective: Objective) -> list[Sample]:
    """The sequences with their weights, and fields that clip now and then. Every third has no teacher's target."""
    draw = torch.Generator().manual_seed(4)
    samples = []
    for sample in make_sequences():
        for name in objective.field_names:
            if name == "advantages":
                sample = sample.with_constant(name, float(torch.randn((), generator=draw)))
            elif name in ("returns", "old_values"):
                sample = sample.with_field(name, 0.5 * torch.randn(sample.response_length, generator=draw))
            elif name not in ("weights", "distill_weights"):
                sample = sample.with_field(name, -4.6 + 0.3 * torch.randn(sample.response_length, generator=draw))
        samples.append(sample)
    if isinstance(config, LikelihoodConfig):
        return weighed_by(config, samples)
    assert isinstance(config, PolicyConfig)
    if isinstance(config, SdpoConfig):
        return with_weights(config, samples, [None if sample.id % 3 == 0 else 1 + sample.id for sample in samples])
    aggregation = "token-mean" if isinstance(objective, ValueRegression) else str(config.algorithm.aggregation)
    return weighed(samples, aggregation, horizon=config.rollout.max_new_tokens)


def gradient(config: Config, directory: str, cut: Cut, *, critic: bool = False) -> Gradient:
    """The loss and every gradient by Hugging Face name, on every rank of a world that has been joined.

    Of the policy, or of the critic.
    """
    mesh = create_mesh(**cut.layout)
    model = ModelConfig(path=directory, weights=RANDOM)
    worker, objective = _critic(config, model, mesh) if critic else _policy(config, model, mesh)
    worker.vocabulary_chunk = cut.chunk
    samples = make_samples(config, objective)
    if cut.backwards:
        samples.reverse()
    plan = _one_by_one(len(samples), mesh.dp_size) if cut.alone else worker.plan(samples, cut.max_tokens)
    metrics = worker.forward_backward(samples, plan, objective)
    named = {name: value.float().cpu().clone() for name, value in worker.named_hf_gradients()}
    worker.close()
    return Gradient(metrics[_loss_name(config, critic=critic)].result(), named)


def _loss_name(config: Config, *, critic: bool) -> str:
    if critic:
        return "critic/vf_loss" if isinstance(config, PpoConfig) else "critic/weighed_values"
    return "sft/loss" if isinstance(config, LikelihoodConfig) else "actor/loss"


def _policy(config: Config, model: ModelConfig, mesh: Mesh) -> tuple[ModelWorker, Any]:
    worker = ModelWorker(model, OptimConfig(), mesh, total_steps=1)
    return worker, objective_of(config, worker)


def _critic(config: Config, model: ModelConfig, mesh: Mesh) -> tuple[ModelWorker, Any]:
    """PPO's regression; a discriminator's values under slopes, whatever loss of the scores these come from."""
    reading = Reading.before if isinstance(config, PpoConfig) else Reading.at
    critic = CriticWorker(model, OptimConfig(), mesh, total_steps=1, reading=reading)
    return critic, ValueRegression(config.ppo.value_clip) if isinstance(config, PpoConfig) else WeighedValues()


def _one_by_one(count: int, ranks: int) -> StepPlan:
    rounds = -(-count // ranks)
    places = [[i * ranks + rank for i in range(rounds)] for rank in range(ranks)]
    return StepPlan(tuple(tuple((p,) if p < count else () for p in row) for row in places))


def difference(found: Gradient, expected: Gradient) -> Difference:
    """How far two computations of one gradient are apart."""
    assert found.named.keys() == expected.named.keys()
    apart = {
        name: float((found.named[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for name, value in expected.named.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    scale = max(abs(expected.loss), *(float(value.abs().max()) for value in expected.named.values()), 1e-30)
    return Difference(abs(found.loss - expected.loss) / scale, apart[worst], worst)


def verify(config: Config) -> int:
    """Prints the table; 1 if anything differs by more than TOLERANCE, else 0. Collective."""
    load_shape(config.model.path)
    with tempfile.TemporaryDirectory() as folder:
        tiny_directory(config.model.path, Path(folder))
        failed = _table(config, folder, critic=False)
        if isinstance(config, PpoConfig | GadConfig):
            failed |= _table(config, folder, critic=True)
    return int(failed)


def _table(config: Config, folder: str, *, critic: bool) -> bool:
    """Prints how far every cut is from one rank and one micro-batch; whether any is too far. Collective."""
    join_world(alone=True)
    expected = gradient(config, folder, Cut(name="reference", max_tokens=WIDE), critic=critic)
    destroy_mesh()
    join_world(f"verify {critic}")
    world, first = dist.get_world_size(), dist.get_rank() == 0
    failed = False
    if first:
        print(f"{'cut':<34} {'loss':>9} {'gradient':>9}   worst parameter")
    for cut in cuts(world, experts=load_shape(folder).experts is not None):
        apart = difference(gradient(config, folder, cut, critic=critic), expected)
        wrong = any_rank(not (apart.loss <= TOLERANCE and apart.gradient <= TOLERANCE))
        failed |= wrong
        if first:
            verdict = "DIFFERS" if wrong else ""
            print(f"{cut.name:<34} {apart.loss:9.1e} {apart.gradient:9.1e}   {apart.worst} {verdict}", flush=True)
        destroy_mesh()
        join_world(f"after {cut.name} {critic}")
    if first:
        print(_verdict(config, world, failed, critic=critic))
    destroy_mesh()
    return failed


def _verdict(config: Config, world: int, failed: bool, *, critic: bool) -> str:
    family = load_shape(config.model.path).family.name
    said = "differs by more than" if failed else "is the same within"
    whose = f"the critic of {config.trainer}" if critic else config.trainer
    return (
        f"{whose} on a tiny {family}, {world} rank(s): the gradient {said} {TOLERANCE:g} (relative, float32) "
        "of that of one rank and one micro-batch"
    )
