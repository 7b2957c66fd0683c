"""The critic: values and gradients are those of a dense model under every layout; what its weights are made of."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_invariance import make_samples
from tests.models import tiny_model

CUTS = {
    "tp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "dp2": (2, {"dp": 2}),
    "tp2_pp2_sp": (4, {"tp": 2, "pp": 2, "sequence_parallel": True}),
}


def make_critic(directory: str, layout: dict, reading: str = "at", weights: str = "pretrained", **optim: Any) -> Any:
    from megatron_rl.config.schema import ModelConfig, OptimConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.critic import CriticWorker, Reading

    model = ModelConfig(path=directory, weights=weights, seed=7)
    return CriticWorker(model, OptimConfig(**optim), create_mesh(**layout), total_steps=10, reading=Reading[reading])


def sloped_samples() -> list:
    """The sequences of the invariance test, with a slope for each token."""
    generator = torch.Generator().manual_seed(8)
    return [
        sample.with_field("slopes", torch.randn(sample.response_length, generator=generator))
        for sample in make_samples("token-mean")
    ]


def values_and_gradients(directory: str, layout: dict, reading: str, max_tokens: int) -> tuple[dict, dict]:
    from megatron_rl.workers.critic import WeighedValues

    worker, samples = make_critic(directory, layout, reading), sloped_samples()
    plan = worker.plan(samples, max_tokens)
    values = worker.values(samples, plan)
    worker.forward_backward(samples, plan, WeighedValues())
    named = {name: gradient.float().clone() for name, gradient in worker.named_hf_gradients()}
    worker.close()
    return values, named


def dense(directory: str, reading: str, **options: Any) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Values of each sample, and the gradient of sum slope * value, by transformers in float64."""
    from transformers import AutoModel

    from megatron_rl.models.random_weights import scalar_head

    body = AutoModel.from_pretrained(directory, dtype=torch.float64, **options)
    head = scalar_head(body.config.hidden_size, 7).double().requires_grad_()
    values, loss = {}, torch.zeros((), dtype=torch.float64)
    for sample in sloped_samples():
        hidden = body(sample.token_ids[None]).last_hidden_state[0]
        first = sample.prompt_length - (reading == "before")
        own = (hidden @ head[0])[first : first + sample.response_length][sample.loss_mask]
        loss = loss + (sample.fields["slopes"][sample.loss_mask].double() * own).sum()
        values[sample.id] = own.detach()
    loss.backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in body.named_parameters()}
    return values, {**gradients, "score.weight": head.grad}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True))


# At the other reading the index differs, and nothing that a layout could change.
SHORT = ("tp1", "tp2_sp", "pp2", "tp2_pp2_sp")
CASES = [
    *((cut, "at") if cut in SHORT else pytest.param(cut, "at", marks=pytest.mark.full) for cut in CUTS),
    ("tp1", "before"),
]


@pytest.mark.parametrize(("cut", "reading"), CASES)
def test_values_and_gradients_are_those_of_a_dense_model(pool: Pool, model: str, cut: str, reading: str) -> None:
    world, layout = CUTS[cut]
    expected, slopes = dense(model, reading)
    for values, gradients in pool.run(values_and_gradients, world, model, layout, reading, 48):
        assert values.keys() == expected.keys()
        for sample_id, value in values.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value.double(), expected[sample_id], rtol=0, atol=1e-6)
        assert gradients.keys() == slopes.keys()
        for name, gradient in gradients.items():
            scale = slopes[name].abs().max()
            assert (gradient.double() - slopes[name]).abs().max() < 1e-5 * scale, name


def returns_and_old_values() -> list:
    """The sequences of the invariance test, with targets near and far from the values, and weights."""
    from megatron_rl.data.samples import weighed

    generator = torch.Generator().manual_seed(9)
    samples = make_samples("token-mean")
    for name in ("returns", "old_values"):
        samples = [s.with_field(name, 0.4 * torch.randn(s.response_length, generator=generator)) for s in samples]
    return weighed(samples, "token-mean")


def regression(directory: str, layout: dict) -> tuple[float, float, dict[str, Tensor]]:
    from megatron_rl.workers.critic import ValueRegression

    worker, samples = make_critic(directory, layout, "before"), returns_and_old_values()
    metrics = worker.forward_backward(samples, worker.plan(samples, 48), ValueRegression(0.2))
    named = {name: gradient.float().clone() for name, gradient in worker.named_hf_gradients()}
    worker.close()
    return metrics["critic/vf_loss"].result(), metrics["critic/vf_clipfrac"].result(), named


def dense_regression(directory: str) -> tuple[float, float, dict[str, Tensor]]:
    """The loss with its clip written out, on values of transformers in float64; the mean over all tokens."""
    from transformers import AutoModel

    from megatron_rl.models.random_weights import scalar_head

    body = AutoModel.from_pretrained(directory, dtype=torch.float64)
    head = scalar_head(body.config.hidden_size, 7).double().requires_grad_()
    losses, clipped = [], []
    for sample in returns_and_old_values():
        hidden = body(sample.token_ids[None]).last_hidden_state[0]
        values = (hidden @ head[0])[sample.prompt_length - 1 : -1][sample.loss_mask]
        returns, old = (sample.fields[name][sample.loss_mask].double() for name in ("returns", "old_values"))
        near = torch.minimum(torch.maximum(values, old - 0.2), old + 0.2)
        free, bound = (values - returns) ** 2, (near - returns) ** 2
        losses.append(torch.where(bound > free, bound, free) / 2)
        clipped.append((bound > free).double())
    loss = torch.cat(losses).mean()
    loss.backward()
    gradients = {f"model.{name}": parameter.grad for name, parameter in body.named_parameters()}
    return loss.item(), torch.cat(clipped).mean().item(), {**gradients, "score.weight": head.grad}


@pytest.mark.parametrize("cut", ["tp1", "tp2_sp", pytest.param("pp2", marks=pytest.mark.full)])
def test_ppo_regression_has_the_gradient_of_a_dense_model(pool: Pool, model: str, cut: str) -> None:
    world, layout = CUTS[cut]
    loss, clipped, slopes = dense_regression(model)
    assert 0.1 < clipped < 0.9
    for found, fraction, gradients in pool.run(regression, world, model, layout):
        assert found == pytest.approx(loss, rel=1e-5) and fraction == pytest.approx(clipped)
        assert gradients.keys() == slopes.keys()
        for name, gradient in gradients.items():
            scale = slopes[name].abs().max()
            assert (gradient.double() - slopes[name]).abs().max() < 1e-5 * scale, name


def measured(critic: Any) -> dict[int, Tensor]:
    samples = sloped_samples()
    return critic.values(samples, critic.plan(samples, 48))


def starts_from(directory: str, layout: dict, weights: str) -> dict[int, Tensor]:
    return measured(make_critic(directory, layout, weights=weights))


def save_actor(directory: str, folder: str) -> None:
    from megatron_rl.checkpoint.store import CheckpointStore
    from tests.dist.test_worker import make_worker

    CheckpointStore(folder, keep=1).save(1, {"actor": make_worker(directory, {"tp": 2})}, {})


def save_trained(directory: str, folder: str) -> dict[int, Tensor]:
    from megatron_rl.checkpoint.store import CheckpointStore
    from megatron_rl.workers.critic import WeighedValues

    critic, samples = make_critic(directory, {"tp": 2}, lr=1e-2), sloped_samples()
    critic.forward_backward(samples, critic.plan(samples, 48), WeighedValues())
    assert critic.step().applied
    CheckpointStore(folder, keep=1).save(1, {"critic": critic}, {})
    return measured(critic)


def test_what_a_critic_starts_from(pool: Pool, model: str, tmp_path: Path) -> None:
    """A language model's files, its checkpoint, a critic's checkpoint, or nothing; in another layout the same."""
    pool.run(save_actor, 2, model, f"{tmp_path}/actor")
    trained = pool.run(save_trained, 2, model, f"{tmp_path}/critic")[0]
    checkpoint = "step_00000001"
    pretrained, actor, critic, first, second = (
        pool.run(starts_from, 2, model, layout, weights)[0]
        for layout, weights in (
            ({"tp": 2}, "pretrained"),
            ({"tp": 2}, f"{tmp_path}/actor/{checkpoint}"),
            ({"pp": 2}, f"{tmp_path}/critic/{checkpoint}"),
            ({"tp": 2}, "random"),
            ({"pp": 2}, "random"),
        )
    )
    for sample_id, value in pretrained.items():
        assert torch.equal(value, actor[sample_id])
        torch.testing.assert_close(trained[sample_id], critic[sample_id], rtol=0, atol=1e-5)
        torch.testing.assert_close(first[sample_id], second[sample_id], rtol=0, atol=1e-6)
        if len(value):
            assert 0 < value.abs().max() < 0.5 and not torch.allclose(value, trained[sample_id], atol=1e-3)


def export(directory: str, folder: str) -> dict[int, Tensor]:
    import torch.distributed as dist

    from megatron_rl.checkpoint.hf import write_model

    critic = make_critic(directory, {"tp": 2})
    write_model(critic.named_hf_weights(), folder, like=directory, write=dist.get_rank() == 0)
    return measured(critic)


def test_an_exported_critic_is_read_by_transformers_and_by_us(pool: Pool, model: str, tmp_path: Path) -> None:
    """As a sequence classifier with one label its logit is the value of the last token."""
    from transformers import AutoModelForSequenceClassification

    values = pool.run(export, 2, model, f"{tmp_path}/hf")[0]
    for sample_id, value in pool.run(starts_from, 2, f"{tmp_path}/hf", {"pp": 2}, "pretrained")[0].items():
        torch.testing.assert_close(value, values[sample_id], rtol=0, atol=1e-6)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=1)
    for sample in sloped_samples():
        if sample.loss_mask.any() and sample.loss_mask[-1]:
            with torch.no_grad():
                logit = classifier(sample.token_ids[None]).logits
            assert logit.item() == pytest.approx(values[sample.id][-1].item(), abs=1e-5)
