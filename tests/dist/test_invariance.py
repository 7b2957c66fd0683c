"""The invariance test: one update's loss and every parameter gradient are the same under every layout and packing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.models import tiny_model

VOCABULARY = 99
WIDE, NARROW = 4096, 48  # tokens per micro-batch: everything together, and a few sequences at a time


@dataclass(frozen=True)
class Case:
    """A layout and a way to cut the batch. `alone`: one sequence per micro-batch."""

    world: int = 1
    layout: tuple[tuple[str, Any], ...] = ()
    max_tokens: int = WIDE
    alone: bool = False


CASES = {
    "tp1_split": Case(max_tokens=NARROW),
    "tp1_alone": Case(alone=True),
    "tp2": Case(2, (("tp", 2),)),
    "tp2_split": Case(2, (("tp", 2),), NARROW),
    "tp2_sp": Case(2, (("tp", 2), ("sequence_parallel", True))),
    "tp2_sp_alone": Case(2, (("tp", 2), ("sequence_parallel", True)), alone=True),
    "pp2": Case(2, (("pp", 2),)),
    "pp2_split": Case(2, (("pp", 2),), NARROW),
    "pp2_vpp2": Case(2, (("pp", 2), ("vpp", 2)), NARROW),
    "dp2": Case(2, (("dp", 2),)),
    "dp2_split": Case(2, (("dp", 2),), NARROW),
    "tp2_sp_recompute": Case(2, (("tp", 2), ("sequence_parallel", True), ("recompute", True)), NARROW),
    "pp2_vpp2_recompute": Case(2, (("pp", 2), ("vpp", 2), ("recompute", True)), NARROW),
    "tp2_pp2": Case(4, (("tp", 2), ("pp", 2)), NARROW),
    "tp2_dp2_sp": Case(4, (("tp", 2), ("dp", 2), ("sequence_parallel", True)), NARROW),
}
# What these show, the same layouts with more micro-batches do.
LONG = ("tp1_alone", "pp2_vpp2", "tp2", "pp2", "dp2", "tp2_sp_alone", "tp2_sp_recompute", "tp2_dp2_sp")
MARKED = [pytest.param(case, id=name, marks=[pytest.mark.full] * (name in LONG)) for name, case in CASES.items()]


def make_samples(mode: str) -> list:
    """Thirteen sequences, some loss tokens masked, one response without any, and old log-probabilities that clip."""
    from megatron_rl.data.samples import Sample, weighed

    generator = torch.Generator().manual_seed(3)
    samples = []
    for number in range(13):
        prompt = int(torch.randint(1, 9, (), generator=generator))
        response = int(torch.randint(1, 14, (), generator=generator))
        mask = torch.rand(response, generator=generator) > 0.2
        samples.append(
            Sample(
                id=number,
                # transformers gives the pad token (0) no gradient as an input.
                token_ids=torch.randint(1, VOCABULARY, (prompt + response,), generator=generator),
                prompt_length=prompt,
                loss_mask=mask & (number != 4),
                fields={
                    "advantages": torch.full((response,), float(torch.randn((), generator=generator))),
                    "old_log_probs": -5 + 0.5 * torch.randn(response, generator=generator),
                    "ref_log_probs": -5 + 0.5 * torch.randn(response, generator=generator),
                },
            )
        )
    return weighed(samples, mode, horizon=7.5)


# Every loss of a policy, with bounds that act on some tokens, and the weights that its paper gives to tokens.
LOSSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "grpo": ("ppo_clip", {"clip_low": 0.2, "clip_high": 0.28}, "token-mean"),
    "ema": ("ppo_clip", {"clip_low": 0.2, "clip_high": 0.28}, "token-mean"),
    "gspo": ("gspo", {"clip_low": 0.3, "clip_high": 0.4}, "seq-mean-token-mean"),
    "gmpo": ("geo_mean", {}, "seq-mean-token-mean"),
    "sapo": ("sapo", {}, "seq-mean-token-mean"),
    "cispo": ("cispo", {"clip_low": 0.3, "clip_high": 0.4}, "token-mean"),
    "dppo_tv": ("dppo_tv", {"clip_low": 2e-3, "clip_high": 2e-3}, "seq-mean-token-sum"),
    "dppo_kl": ("dppo_kl", {"clip_low": 2e-3, "clip_high": 2e-3}, "seq-mean-token-sum"),
    "reinforce": ("reinforce", {}, "token-mean"),
    "dro": ("dro", {"beta": 0.3}, "token-mean"),
    "sft": ("likelihood", {}, "seq-mean-token-sum-norm"),
}


def objective(name: str) -> Any:
    from megatron_rl.workers.objective import NegativeLogLikelihood, PolicyGradient
    from megatron_rl.workers.smoothing import Smoother

    loss, options, _ = LOSSES[name]
    if loss == "likelihood":
        return NegativeLogLikelihood()
    return PolicyGradient(
        loss=loss,
        options=options,
        smoother=Smoother(axis="token", beta=0.6, init="one", gradient="full") if name == "ema" else None,
        entropy_coeff=0.01,
        kl_estimator="k2" if name == "gspo" else "k3",
        kl_gradient="is_ratio" if name == "ema" else "naive",
        kl_coeff=0.05,
        temperature=0.9,
        on_policy=False,
    )


def plan_alone(samples: list, worker: Any) -> Any:
    from megatron_rl.data.planner import StepPlan

    size = worker.mesh.dp_size
    rounds = -(-len(samples) // size)
    return StepPlan(
        tuple(
            tuple((i * size + rank,) if i * size + rank < len(samples) else () for i in range(rounds))
            for rank in range(size)
        )
    )


def gradients(
    directory: str,
    layout: dict,
    max_tokens: int,
    alone: bool,
    dtype: str,
    fault: str = "",
    names: tuple[str, ...] = ("grpo", "gspo"),
) -> dict[str, tuple[float, dict[str, Tensor], float]]:
    """Per algorithm: loss, gradients by Hugging Face name, and their norm as the optimizer clips by it."""

    from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.model_worker import ModelWorker

    mesh = create_mesh(**layout)
    worker = ModelWorker(
        ModelConfig(path=directory, dtype=DType(dtype)), OptimConfig(lr=0.0, clip_grad=0.5), mesh, total_steps=2
    )
    found = {}
    for name in names:
        samples = make_samples(LOSSES[name][2])
        plan = plan_alone(samples, worker) if alone else worker.plan(samples, max_tokens)
        if fault == "local_normaliser":
            samples = normalised_per_micro_batch(samples, plan)
        if fault == "mask":
            samples = mask_depends_on_place(samples, plan)
        metrics = worker.forward_backward(samples, plan, objective(name))
        named = {key: value.float().clone() for key, value in worker.named_hf_gradients()}
        found[name] = (metrics["sft/loss" if name == "sft" else "actor/loss"].result(), named, worker.step().grad_norm)
    return found


def normalised_per_micro_batch(samples: list, plan: Any) -> list:
    """The classical fault: each micro-batch is a mean of its own, and the means are averaged."""
    changed = list(samples)
    batches = [indices for rank in plan.micro_batches for indices in rank if indices]
    for indices in batches:
        total = sum(float(samples[i].fields["weights"][samples[i].loss_mask].sum()) for i in indices)
        for i in indices:
            changed[i] = samples[i].with_field("weights", samples[i].fields["weights"] / (total * len(batches)))
    return changed


def mask_depends_on_place(samples: list, plan: Any) -> list:
    """A mask that loses the first loss token of every micro-batch but the first."""
    from dataclasses import replace

    changed = list(samples)
    for rank in plan.micro_batches:
        for indices in [batch for batch in rank if batch][1:]:
            first = indices[0]
            mask = samples[first].loss_mask.clone()
            if mask.any():
                mask[mask.nonzero()[0, 0]] = False
            changed[first] = replace(samples[first], loss_mask=mask)
    return changed


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True)


@pytest.fixture(scope="module")
def reference(pool: Pool, model: Path) -> dict:
    return pool.run(gradients, 1, str(model), {}, WIDE, False, "float32", names=tuple(LOSSES))[0]


def difference(found: dict, reference: dict) -> float:
    """The largest relative difference of loss, norm and any parameter's gradient."""
    worst = 0.0
    for name, (other_loss, other_named, other_norm) in found.items():
        loss, named, norm = reference[name]
        assert other_named.keys() == named.keys()
        worst = max(worst, abs(other_loss - loss) / abs(loss), abs(other_norm - norm) / norm)
        for key, gradient in named.items():
            assert gradient.abs().max() > 0, key
            worst = max(worst, float((other_named[key] - gradient).abs().max() / gradient.abs().max()))
    return worst


@pytest.mark.parametrize("case", MARKED)
def test_layouts_agree(pool: Pool, model: Path, reference: dict, case: Case) -> None:
    arguments = (str(model), dict(case.layout), case.max_tokens, case.alone, "float32")
    for found in pool.run(gradients, case.world, *arguments, names=tuple(LOSSES)):
        assert found.keys() == reference.keys()
        assert difference(found, reference) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_untied_models_agree(pool: Pool, tmp_path: Path, family: str) -> None:
    """Llama; and Qwen3, whose query and key norms see only their rank's heads."""
    model = str(tiny_model(tmp_path / family, family))
    expected = pool.run(gradients, 1, model, {}, WIDE, False, "float32")[0]
    for layout, world in (({"tp": 2}, 2), ({"tp": 2, "sequence_parallel": True}, 2), ({"pp": 2}, 2)):
        for found in pool.run(gradients, world, model, layout, NARROW, False, "float32"):
            assert difference(found, expected) < 1e-5


def test_bfloat16_agrees_within_its_precision(pool: Pool, model: Path, reference: dict) -> None:
    """Where no gate is so narrow that rounding passes tokens through it."""
    for layout, world in (({}, 1), ({"tp": 2}, 2), ({"pp": 2}, 2)):
        for found in pool.run(gradients, world, str(model), layout, NARROW, False, "bfloat16"):
            assert 1e-6 < difference(found, reference) < 0.2


@pytest.mark.parametrize("fault", ["local_normaliser", "mask"])
def test_planted_faults_are_found(pool: Pool, model: Path, reference: dict, fault: str) -> None:
    """The same comparison must fail where a normaliser or a mask depends on the split."""
    found = pool.run(gradients, 1, str(model), {}, NARROW, False, "float32", fault)[0]
    assert difference(found, reference) > 1e-3


def test_gradient_is_that_of_transformers(model: Path, reference: dict) -> None:
    """An independent, dense computation of the same loss: transformers, one sequence at a time, float64."""
    from transformers import AutoModelForCausalLM

    from megatron_rl.algorithms.kl import kl
    from megatron_rl.algorithms.policy_loss import ppo_clip

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for sample in make_samples("token-mean"):
        logits = dense(sample.token_ids[None]).logits[0, sample.prompt_length - 1 : -1] / 0.9
        log_softmax = torch.log_softmax(logits, dim=-1)
        labels = sample.token_ids[sample.prompt_length :]
        logp = log_softmax.gather(1, labels[:, None])[:, 0]
        entropy = -(log_softmax.exp() * log_softmax).sum(-1)
        fields = {name: values.double() for name, values in sample.fields.items()}
        terms = ppo_clip(
            logp, fields["old_log_probs"], fields["advantages"], clip_low=0.2, clip_high=0.28, dual_clip=3.0
        )
        kept = sample.loss_mask
        distance = kl(logp, fields["ref_log_probs"], "k3")
        total = total + (fields["weights"] * (terms.loss - 0.01 * entropy + 0.05 * distance))[kept].sum()
    total.backward()
    loss, named, _ = reference["grpo"]
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in dense.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            named[name].double(), parameter.grad, rtol=0, atol=1e-5 * float(parameter.grad.abs().max())
        )


@pytest.mark.parametrize("name, mode", [("grpo", "token-mean"), ("gspo", "seq-mean-token-mean")])
def test_loss_functions_alone_do_not_depend_on_the_split(name: str, mode: str) -> None:
    """In float64: the whole batch at once, and cut into pieces in another order."""
    from megatron_rl.algorithms import policy_loss
    from megatron_rl.algorithms.reduction import token_weights

    samples = make_samples(mode)
    weights = token_weights([sample.loss_mask for sample in samples], mode)
    generator = torch.Generator().manual_seed(8)
    logp = [-5 + 0.5 * torch.randn(s.response_length, generator=generator, dtype=torch.float64) for s in samples]

    def share(indices: list[int], leaves: list[Tensor]) -> Tensor:
        kept = [samples[i].loss_mask for i in indices]
        flat = {
            key: torch.cat([samples[i].fields[key].double()[mask] for i, mask in zip(indices, kept)])
            for key in ("old_log_probs", "advantages")
        }
        now = torch.cat([leaves[i][mask] for i, mask in zip(indices, kept)])
        ids = torch.cat([torch.full((int(mask.sum()),), place) for place, mask in enumerate(kept)])
        arguments = (now, flat["old_log_probs"], flat["advantages"])
        terms = (
            policy_loss.ppo_clip(*arguments)
            if name == "grpo"
            else policy_loss.gspo(*arguments, ids, len(indices), clip_low=0.3, clip_high=0.4)
        )
        return (torch.cat([weights[i][mask] for i, mask in zip(indices, kept)]) * terms.loss).sum()

    def total(parts: list[list[int]]) -> tuple[Tensor, Tensor]:
        leaves = [values.clone().requires_grad_() for values in logp]
        loss = torch.stack([share(part, leaves) for part in parts]).sum()
        loss.backward()
        return loss.detach(), torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None])

    loss, gradient = total([list(range(13))])
    assert gradient.abs().max() > 0
    for parts in ([[i] for i in range(13)], [[12, 3, 4], [0, 7, 9, 1], [2, 11], [10, 5, 8, 6]]):
        other_loss, other_gradient = total(parts)
        assert abs(other_loss - loss) < 1e-10
        assert (other_gradient - gradient).abs().max() < 1e-10
