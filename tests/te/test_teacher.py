"""Self-distillation from a teacher whose layers are Transformer Engine's, and averages of such weights."""

import pytest
import torch

from tests.dist import test_average
from tests.dist.pool import Pool
from tests.dist.test_distillation import measure
from tests.models import tiny_model
from tests.te.fused import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tied=True, num_hidden_layers=2))


def test_losses_and_gradients_of_distillation(pool: Pool, model: str) -> None:
    """With lists and over the whole vocabulary, and with the actor mixed in."""
    local, fused = (
        pool.run(run, 2, kind, measure, model, model, {"tp": 2, "sequence_parallel": True}, 64, 25, slice(18, None, 3))
        for kind in (False, True)
    )
    for expected, found in zip(local, fused, strict=True):
        for (loss, grads), (value, others) in zip(expected, found, strict=True):
            assert value == pytest.approx(loss, abs=1e-6)
            assert grads.keys() == others.keys()
            for name, gradient in grads.items():
                assert (others[name] - gradient).abs().max() <= 1e-5 * max(float(gradient.abs().max()), 1e-3), name


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_the_average_follows(pool: Pool, model: str, layout: str) -> None:
    """Four steps and the average of the weights: of either layers the same."""
    world, options = test_average.LAYOUTS[layout]
    local, fused = (pool.run(run, world, kind, test_average.follow, model, options, False) for kind in (False, True))
    for expected, found in zip(local, fused, strict=True):
        assert found["used"] == expected["used"] and found["bytes"] == expected["bytes"]
        assert found["average"].keys() == expected["average"].keys()
        assert all(torch.allclose(found["average"][n], x, rtol=0, atol=2e-5) for n, x in expected["average"].items())
