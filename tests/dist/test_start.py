"""Where weights come from: a Hugging Face directory, a seed, a checkpoint of any layout. All layouts start alike."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_checkpoint import save_and_go_on
from tests.dist.test_invariance import make_samples
from tests.models import tiny_model

LAYOUTS = {"tp1": (1, {}), "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}), "pp2_vpp2": (2, {"pp": 2, "vpp": 2})}


def start(directory: str, layout: dict, weights: str) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Exported weights of a frozen model, and what it says of the samples."""
    from megatron_rl.config.schema import ModelConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.sharded_model import ShardedModel

    model = ShardedModel(ModelConfig(path=directory, weights=weights, seed=3), create_mesh(**layout))
    samples = make_samples("token-mean")
    log_probs = model.log_probs(samples, model.plan(samples, 48), 1.0)
    return {name: value.clone() for name, value in model.named_hf_weights()}, log_probs


def refused(directory: str, weights: str) -> str:
    with pytest.raises(ValueError) as caught:
        start(directory, {}, weights)
    return str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", tied=True))


def assert_alike(found: tuple, expected: tuple) -> None:
    for name, weight in expected[0].items():
        assert torch.equal(found[0][name], weight), name
    for sample, values in expected[1].items():
        torch.testing.assert_close(found[1][sample], values, rtol=0, atol=1e-5)


def test_random_weights_are_the_same_everywhere(pool: Pool, model: str) -> None:
    expected = pool.run(start, 1, model, {}, "random")[0]
    matrix = expected[0]["model.layers.1.mlp.down_proj.weight"]
    assert matrix.std() == pytest.approx(0.02, rel=0.03) and abs(float(matrix.mean())) < 1e-3
    assert not torch.equal(matrix, expected[0]["model.layers.2.mlp.down_proj.weight"])
    assert torch.equal(expected[0]["model.norm.weight"], torch.ones(64))
    for world, layout in list(LAYOUTS.values())[1:]:
        for found in pool.run(start, world, model, layout, "random"):
            assert_alike(found, expected)


def test_a_checkpoint_gives_its_weights_to_any_layout(pool: Pool, model: str, tmp_path: Path) -> None:
    """Trained on two pipeline stages; the run directory and the checkpoint itself both name it."""
    pool.run(save_and_go_on, 2, model, {"pp": 2}, str(tmp_path / "checkpoints"), None)
    pretrained = pool.run(start, 1, model, {}, "pretrained")[0]
    expected = pool.run(start, 1, model, {}, str(tmp_path))[0]
    moved = [name for name, weight in pretrained[0].items() if not torch.equal(weight, expected[0][name])]
    assert len(moved) == len(pretrained[0])
    for world, layout in list(LAYOUTS.values())[1:]:
        for found in pool.run(start, world, model, layout, str(tmp_path / "checkpoints" / "step_00000002")):
            assert_alike(found, expected)


def test_the_checkpoint_of_another_model_is_refused(pool: Pool, model: str, tmp_path: Path) -> None:
    pool.run(save_and_go_on, 1, model, {}, str(tmp_path / "checkpoints"), None)
    other = str(tiny_model(tmp_path / "other", "qwen3"))
    assert (
        "of another model: tied is True there and False in model.path" in pool.run(refused, 1, other, str(tmp_path))[0]
    )
    assert (
        "is neither 'pretrained' nor 'random' nor a checkpoint nor a run"
        in pool.run(refused, 1, other, str(tmp_path / "x"))[0]
    )
