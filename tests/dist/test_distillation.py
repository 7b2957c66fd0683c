"""Self-distillation on a whole model: the loss and every gradient are the same however the two passes are cut."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.models import tiny_model

VOCABULARY = 99
# (world, layout, tokens per micro-batch, columns of the vocabulary at once)
CUTS: dict[str, tuple[int, dict[str, Any], int, int]] = {
    "tp2": (2, {"tp": 2}, 120, 1024),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}, 64, 25),
    "tp4": (4, {"tp": 4}, 64, 1024),
    "pp2": (2, {"pp": 2}, 64, 1024),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}, 64, 1024),
    "dp2": (2, {}, 64, 1024),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}, 64, 1024),
    "alone": (1, {}, 40, 13),
}
FACTORS = [1.0, None, 2.0, 1.0, 0.0, 1.0, None, 0.5, 1.0]  # of the responses; None where there is no target
POLICY = {"clip_low": 0.3, "clip_high": 0.4, "dual_clip": 3.0}
ENTROPY_COEFF = 0.05
# Each axis once, with a third of the losses; all of them under every cut in the long run.
THIRDS = {"tp2_sp": 0, "pp2": 1, "dp2": 2}
CASES = [
    *((cut, slice(start, None, 3)) for cut, start in THIRDS.items()),
    *(pytest.param(cut, slice(None), marks=pytest.mark.full) for cut in CUTS),
]
LOSSES = [
    *({"alpha": a, "tail": t, "topk": k} for a, t, k in product((0.0, 0.3, 0.5, 1.0), ("exact", "none"), (1, 20, 99))),
    {"alpha": 0.5, "tail": "clamped", "topk": 20},
    *({"alpha": a, "support": s, "topk": 20} for a, s in product((0.0, 0.5, 1.0), ("teacher", "full"))),
    {"alpha": 1.0, "sampled": True, "topk": 20},
    {"alpha": 0.5, "topk": 20, "mixed": True},
    {"alpha": 0.5, "topk": 20, "entropy_weighting": 0.7},
    # With a policy loss beside it.
    *({"alpha": 0.5, "topk": 20, "weight": w} for w in (0.0, 0.4, 1.0)),
    {"alpha": 0.3, "support": "full", "topk": 20, "weight": 0.4, "entropy_weighting": 0.7},
    {"alpha": 1.0, "sampled": True, "topk": 20, "weight": 0.4},
]


def make_pairs() -> list[tuple[Any, Any]]:
    """Student's and teacher's samples: other prompts, longer, and the same responses with the same masks."""
    from dataclasses import replace

    from megatron_rl.data.samples import from_example, weighed, weighed_targets

    draw = torch.Generator().manual_seed(11)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()

    students, teachers = [], []
    for number in range(9):
        response = ids(1, 12)
        mask = torch.rand(len(response), generator=draw) > 0.2
        mask[0] = True
        student, teacher = (
            replace(from_example(number, ids(*bounds), response), loss_mask=mask) for bounds in ((1, 9), (8, 24))
        )
        noise = 0.5 * torch.randn(len(response), generator=draw)
        students.append(student.with_field("old_log_probs", noise - 5).with_constant("advantages", number - 4.0))
        teachers.append(teacher)
    targets = weighed_targets(weighed(students, "seq-mean-token-mean"), FACTORS, "token-mean")
    return list(zip(targets, teachers))


def measure(
    student: str, teacher: str, layout: dict, max_tokens: int, chunk: int, chosen: slice
) -> list[tuple[float, dict]]:
    """Of each chosen loss, its value and gradients by name."""
    from megatron_rl.config.schema import ModelConfig, OptimConfig
    from megatron_rl.config.sdpo import TeacherConfig, TeacherMode
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.distillation import Distillation
    from megatron_rl.workers.model_worker import ModelWorker
    from megatron_rl.workers.objective import PolicyGradient
    from megatron_rl.workers.teacher import Teacher

    mesh = create_mesh(**layout)
    actor = ModelWorker(ModelConfig(path=student), OptimConfig(), mesh, total_steps=1)
    actor.vocabulary_chunk = chunk
    pairs = make_pairs()
    students = [pair[0] for pair in pairs]
    plan = actor.plan(students, max_tokens)
    found = []
    reader = Teacher(ModelConfig(path=teacher), TeacherConfig(mode=TeacherMode.trust_region), actor)
    targets, other = reader.targets([pair[1] for pair in pairs], plan, max_tokens)
    for loss in LOSSES[chosen]:
        options: dict[str, Any] = {"support": "student", "tail": "exact", "sampled": False, **loss}
        mixed = options.pop("mixed", False)
        policy = PolicyGradient(
            loss="ppo_clip", options=POLICY, entropy_coeff=ENTROPY_COEFF, temperature=0.8, on_policy=False
        )
        objective = Distillation(
            targets=targets,
            other=other if mixed else None,
            mix=0.3,
            policy=policy if "weight" in loss else None,
            is_clip=1.5,
            corrected=False,
            temperature=0.8,
            on_policy=False,
            **options,
        )
        value = actor.forward_backward(students, plan, objective)["actor/loss"].result()
        found.append((value, {name: grad.clone() for name, grad in actor.named_hf_gradients()}))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A student, and a teacher with other weights and another, untied head."""
    folder = tmp_path_factory.mktemp("models")
    student = tiny_model(folder / "student", "qwen3", tied=True, vocab_size=VOCABULARY)
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(student)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    teacher.save_pretrained(folder / "teacher")
    return str(student), str(folder / "teacher")


@pytest.fixture(scope="module")
def expected(pool: Pool, models: tuple[str, str]) -> list[tuple[float, dict[str, Tensor]]]:
    """One rank, everything in one micro-batch."""
    return pool.run(measure, 1, *models, {}, 4096, 1024, slice(None))[0]


def test_weights_are_shared_by_target_tokens() -> None:
    """The distillation's sum to the mean factor of the tokens with a target, the policy loss's to one over all."""
    pairs = make_pairs()
    sums = {name: sum(float(mine.fields[name].sum()) for mine, _ in pairs) for name in ("weights", "distill_weights")}
    counts = [int(mine.loss_mask.sum()) for mine, _ in pairs]
    held = [(count, factor) for count, factor in zip(counts, FACTORS) if factor is not None]
    assert sums["weights"] == pytest.approx(1)
    mean = sum(count * factor for count, factor in held) / sum(count for count, _ in held)
    assert sums["distill_weights"] == pytest.approx(mean)


def test_the_loss_is_that_of_two_dense_models(models: tuple[str, str], expected: list) -> None:
    """Every divergence from transformers' logits in float64, and its gradient at one of the weights."""
    from transformers import AutoModelForCausalLM

    from megatron_rl.algorithms import distill
    from megatron_rl.algorithms.policy_loss import ppo_clip

    student, teacher = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in models)

    def logits(model: Any, sample: Any) -> Tensor:
        z = model(sample.token_ids[None]).logits[0, sample.prompt_length - 1 : -1]
        return z[sample.loss_mask] / 0.8

    passes = []
    for mine, read in make_pairs():
        with torch.no_grad():
            targets = logits(teacher, read), logits(student, read)
        passes.append((mine, logits(student, mine), targets))
    name = "model.layers.2.mlp.down_proj.weight"
    weight = dict(student.named_parameters())[name]
    for loss, (value, gradients) in zip(LOSSES, expected, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for mine, z, (t, other) in passes:
            if loss.get("mixed"):
                t = 0.7 * t + 0.3 * other
            labels = mine.token_ids[mine.prompt_length :][mine.loss_mask]
            s, t = z.log_softmax(-1), t.log_softmax(-1)
            logp = s.gather(1, labels[:, None])[:, 0]
            if loss.get("sampled"):
                values = distill.sampled_token(logp, t.gather(1, labels[:, None])[:, 0])
            elif loss.get("support") == "full":
                values = distill.divergence(s, t, loss["alpha"])
            else:
                of = t if loss.get("support") == "teacher" else s
                ids = of.detach().topk(loss["topk"]).indices
                sides = []
                for side in (s, t):
                    rest = side.scatter(1, ids, -torch.inf).logsumexp(1)
                    sides.append(distill.buckets(side.gather(1, ids), rest.clamp(min=-80), loss.get("tail", "exact")))
                values = distill.divergence(*sides, loss["alpha"])
            old, advantages, weights, distill_weights = (
                mine.fields[name][mine.loss_mask].double()
                for name in ("old_log_probs", "advantages", "weights", "distill_weights")
            )
            values = (logp - old).exp().detach().clamp(max=1.5) * values
            values = (loss.get("entropy_weighting", 0) * (t.exp() * t).sum(1)).exp() * values
            share = loss.get("weight", 1.0)
            total = total + share * (distill_weights * values).sum()
            if "weight" in loss:
                entropy = -(s.exp() * s).sum(1)
                surrogate = ppo_clip(logp, old, advantages, **POLICY).loss - ENTROPY_COEFF * entropy
                total = total + (1 - share) * (weights * surrogate).sum()
        assert value == pytest.approx(float(total.detach()), rel=2e-5, abs=1e-6), loss
        (exact,) = torch.autograd.grad(total, weight, retain_graph=True)
        if exact.abs().max() > 1e-9:
            assert (gradients[name].double() - exact).abs().max() < 3e-5 * exact.abs().max() + 1e-8, loss


def test_the_blend_has_its_two_losses_for_ends(expected: list) -> None:
    """At 1 it is the distillation alone, at 0 the policy loss alone, and between them their sum, gradients as well."""
    alone = expected[LOSSES.index({"alpha": 0.5, "tail": "exact", "topk": 20})]
    policy, between, distillation = (
        expected[LOSSES.index({"alpha": 0.5, "topk": 20, "weight": weight})] for weight in (0.0, 0.4, 1.0)
    )
    assert distillation[0] == pytest.approx(alone[0], rel=1e-6) and policy[0] != pytest.approx(alone[0], rel=0.1)
    assert between[0] == pytest.approx(0.6 * policy[0] + 0.4 * alone[0], rel=1e-5)
    for name, gradient in alone[1].items():
        largest = gradient.abs().max()
        assert (distillation[1][name] - gradient).abs().max() < 1e-6 * largest
        blend = 0.6 * policy[1][name] + 0.4 * gradient
        assert (between[1][name] - blend).abs().max() < 1e-5 * blend.abs().max()


@pytest.mark.parametrize(("cut", "chosen"), CASES)
def test_every_cut_agrees(pool: Pool, models: tuple[str, str], expected: list, cut: str, chosen: slice) -> None:
    world, *options = CUTS[cut]
    for found in pool.run(measure, world, *models, *options, chosen):
        for loss, (value, gradients), (other, others) in zip(LOSSES[chosen], expected[chosen], found, strict=True):
            assert other == pytest.approx(value, rel=1e-5, abs=1e-6), loss
            for name, gradient in gradients.items():
                largest = gradient.abs().max().clamp(min=1e-4)
                assert (others[name] - gradient).abs().max() < 1e-5 * largest + 1e-9, (loss, name)
