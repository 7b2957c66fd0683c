"""The worker's verbs: log-probabilities, steps and saved state are the same under every layout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_invariance import make_samples, objective
from tests.models import tiny_model

LAYOUTS = {"tp1": (1, {}), "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}), "pp2": (2, {"pp": 2}), "dp2": (2, {})}


def make_worker(directory: str, layout: dict, dtype: str = "float32", **optim: Any) -> Any:
    from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.model_worker import ModelWorker

    mesh = create_mesh(**layout)
    return ModelWorker(ModelConfig(path=directory, dtype=DType(dtype)), OptimConfig(**optim), mesh, total_steps=10)


def log_probs(directory: str, layout: dict) -> dict[int, Tensor]:
    worker = make_worker(directory, layout)
    samples = make_samples("token-mean")
    return worker.log_probs(samples, worker.plan(samples, 48), 0.7)


def update(worker: Any) -> tuple[float, float, float]:
    samples = make_samples("token-mean")
    metrics = worker.forward_backward(samples, worker.plan(samples, 48), objective("grpo"))
    result = worker.step()
    return metrics["actor/loss"].result(), result.grad_norm, result.lr


def train(directory: str, layout: dict, steps: int, dtype: str) -> tuple[list, dict[str, Tensor]]:
    worker = make_worker(directory, layout, dtype, lr=1e-2, warmup_steps=2, schedule=_linear(), clip_grad=0.5, eps=1e-4)
    history = [update(worker) for _ in range(steps)]
    return history, {name: value.clone() for name, value in worker.named_hf_weights()}


def _linear() -> Any:
    from megatron_rl.config.optim import Schedule

    return Schedule.linear


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_are_those_of_transformers(pool: Pool, model: str, layout: str) -> None:
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    world, options = LAYOUTS[layout]
    for found in pool.run(log_probs, world, model, options):
        for sample in make_samples("token-mean"):
            with torch.no_grad():
                logits = dense(sample.token_ids[None]).logits[0, sample.prompt_length - 1 : -1] / 0.7
            labels = sample.token_ids[sample.prompt_length :]
            expected = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0][sample.loss_mask]
            torch.testing.assert_close(found[sample.id].double(), expected, rtol=0, atol=1e-5)


def test_training_is_the_same_under_every_layout(pool: Pool, model: str) -> None:
    """Four Adam steps: losses, norms, rates and final weights. A large eps, for Adam magnifies rounding at zero."""
    (history, weights), *_ = pool.run(train, 1, model, {}, 4, "float32")
    assert [lr for *_, lr in history] == pytest.approx([0.005, 0.01, 0.00875, 0.0075])
    assert history[3][0] < history[0][0]
    for layout in ("tp2_sp", "pp2", "dp2"):
        world, options = LAYOUTS[layout]
        for found, other in pool.run(train, world, model, options, 4, "float32"):
            for step, expected in zip(found, history, strict=True):
                assert step == pytest.approx(expected, rel=2e-4)
            for name, weight in weights.items():
                assert (other[name] - weight).abs().max() < 2e-4, name


def test_bfloat16_keeps_float32_masters(pool: Pool, model: str) -> None:
    """Updates far below bfloat16's resolution of the weights still add up."""
    history, _ = pool.run(train, 2, model, {"tp": 2}, 4, "bfloat16")[0]
    expected, _ = pool.run(train, 1, model, {}, 4, "float32")[0]
    assert history[3][0] == pytest.approx(expected[3][0], abs=0.03)
