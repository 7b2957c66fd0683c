"""Mixtures of experts: the model is transformers', and losses, gradients, steps and checkpoints know no layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist import test_average, test_checkpoint, test_critic, test_engine
from tests.dist.pool import Pool
from tests.dist.test_invariance import NARROW, WIDE, difference, gradients
from tests.dist.test_model import assert_same_model
from tests.models import tiny_model, tiny_tokenizer

SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "dp2": (2, {"dp": 2}),
    "ep2": (2, {"ep": 2}),
    "etp2": (2, {"etp": 2}),
    "tp2": (2, SP),
    "tp2_ep2": (2, SP | {"ep": 2}),
    "tp2_etp2": (2, SP | {"etp": 2}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2_ep2": (4, {"pp": 2, "vpp": 2, "ep": 2}),
    "tp2_pp2": (4, SP | {"pp": 2}),
    "tp2_ep4": (4, SP | {"ep": 4}),
    "tp2_ep2_etp2": (4, SP | {"ep": 2, "etp": 2}),
    "ep2_dp4": (4, {"ep": 2, "dp": 4}),
    "tp2_ep2_recompute": (2, SP | {"ep": 2, "recompute": True}),
}
# What these show, others do; and of Mixtral, whose tensors only have other names, one layout is enough.
LONG = ("tp1", "dp2", "etp2", "tp2", "pp2", "tp2_pp2", "tp2_ep4", "ep2_dp4")
MARKED = [pytest.param(name, marks=[pytest.mark.full] * (name in LONG)) for name in LAYOUTS]
FAMILIES = ("qwen3_moe", "mixtral")


@pytest.fixture(scope="module", params=[FAMILIES[0], pytest.param(FAMILIES[1], marks=pytest.mark.full)])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return tiny_tokenizer(directory, 99)


def test_mixtral(pool: Pool, tmp_path: Path) -> None:
    assert_same_model(pool, tiny_model(tmp_path / "model", "mixtral"), LAYOUTS["tp2_ep2"], tmp_path / "out")


@pytest.mark.parametrize("layout", MARKED)
def test_logits_and_weights(pool: Pool, model: Path, tmp_path: Path, layout: str) -> None:
    assert_same_model(pool, model, LAYOUTS[layout], tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_files(tmp_path: Path, family: str) -> None:
    """Of what transformers writes, whose own names are others since its version 5."""
    from megatron_rl.models.build import weight_map
    from megatron_rl.models.hf_config import load_shape, num_parameters, tensor_shapes

    model = tiny_model(tmp_path / "model", family)
    held = load_file(model / "model.safetensors")
    assert tensor_shapes(model) == {name: tuple(tensor.shape) for name, tensor in held.items()}
    assert weight_map(load_shape(model)).hf_names() == held.keys()
    assert num_parameters(model) == sum(tensor.numel() for tensor in held.values())


@pytest.fixture(scope="module")
def reference(pool: Pool, model: Path) -> dict:
    return pool.run(gradients, 1, str(model), {}, WIDE, False, "float32")[0]


@pytest.mark.parametrize("layout", MARKED)
def test_gradients_agree(pool: Pool, model: Path, reference: dict, layout: str) -> None:
    world, options = LAYOUTS[layout]
    for found in pool.run(gradients, world, str(model), options, NARROW, False, "float32"):
        assert difference(found, reference) < 1e-5


def test_weights_that_do_not_sum_to_one(pool: Pool, tmp_path: Path) -> None:
    """Qwen3 may leave the chosen weights as the softmax over all experts gave them."""
    model = tiny_model(tmp_path / "model", "qwen3_moe", norm_topk_prob=False)
    assert_same_model(pool, model, LAYOUTS["tp2_ep2"], tmp_path / "out")


def cosine(found: dict, expected: dict) -> float:
    """Of the angle between two gradients of GRPO."""
    a, b = (
        torch.cat([named[key].flatten() for key in sorted(named)]) for _, named, _ in (found["grpo"], expected["grpo"])
    )
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def test_bfloat16_points_the_same_way(pool: Pool, model: Path, reference: dict) -> None:
    """Rounding sends some tokens to other experts, whose gradients then differ; the cut must not add to that."""
    one = cosine(pool.run(gradients, 1, str(model), {}, NARROW, False, "bfloat16")[0], reference)
    for found in pool.run(gradients, 2, str(model), LAYOUTS["tp2_ep2"][1], NARROW, False, "bfloat16"):
        assert 0.9 < cosine(found, reference) < 1 - 1e-6
        assert abs(cosine(found, reference) - one) < 0.05
        assert found["grpo"][0] == pytest.approx(reference["grpo"][0], rel=0.05)


def test_training_goes_on_under_other_layouts(pool: Pool, model: Path, tmp_path: Path) -> None:
    """Saved at TP2 EP2, continued there bit by bit, and from there wherever experts lie elsewhere."""
    places = [str(tmp_path / str(place)) for place in range(6)]
    go_on = test_checkpoint.save_and_go_on
    expected, weights = pool.run(go_on, 2, str(model), LAYOUTS["tp2_ep2"][1], places[0], None)[0]
    layouts = ("tp2_ep2", "ep2", "etp2", "tp2_pp2", "tp2_ep2")
    for before, place, layout in zip(places, places[1:], layouts):
        world, options = LAYOUTS[layout]
        for figures, found in pool.run(go_on, world, str(model), options, place, before):
            exact = layout == "tp2_ep2"
            assert figures[0] == (expected[0] if exact else pytest.approx(expected[0], abs=2e-6)), layout
            for key, weight in weights.items():
                assert (found[key] - weight).abs().max() <= (0 if exact else 5e-6), (layout, key)


@pytest.mark.parametrize("layout", ["tp2_ep2", "ep2_dp4"])
def test_the_average_is_the_one_by_hand(pool: Pool, model: Path, layout: str) -> None:
    world, options = LAYOUTS[layout]
    for found in pool.run(test_average.follow, world, str(model), options, False):
        expected = test_average.averaged_by_hand(found["history"], test_average.DECAYS)
        assert expected.keys() == found["average"].keys()
        last = found["history"][-1]
        for name, value in expected.items():
            assert (found["average"][name] - value).abs().max() < 1e-6, name
            assert (found["history"][0][name] - value).abs().max() > 1e-3, name
        apart = sum(float((expected[name] - last[name]).square().sum()) for name in last)
        whole = sum(float(last[name].double().square().sum()) for name in last)
        assert found["distance"] == pytest.approx((apart / whole) ** 0.5, rel=1e-3)


def test_a_critic_is_the_dense_one(pool: Pool, model: Path) -> None:
    arguments = (str(model), {}, "at", WIDE)
    values, slopes = pool.run(test_critic.values_and_gradients, 1, *arguments)[0]
    expected, _ = test_critic.dense(str(model), "at", experts_implementation="eager")
    arguments = (str(model), LAYOUTS["tp2_ep2"][1], "at", NARROW)
    for found, gradients_ in pool.run(test_critic.values_and_gradients, 2, *arguments):
        for sample_id, value in expected.items():
            torch.testing.assert_close(values[sample_id].double(), value, rtol=0, atol=1e-6)
            torch.testing.assert_close(found[sample_id].double(), value, rtol=0, atol=1e-6)
        for name, gradient in gradients_.items():
            assert (gradient - slopes[name]).abs().max() < 1e-5 * slopes[name].abs().max(), name


def test_the_engine_answers_as_the_trainer_would(pool: Pool, model: Path) -> None:
    expected = None
    for layout in ("tp1", "tp2_ep2"):
        world, options = LAYOUTS[layout]
        for groups, gap in pool.run(test_engine.answers, world, str(model), options, 64, {}):
            assert gap[0] < 1e-4
            tokens = [[rollout.token_ids for rollout in group.rollouts] for group in groups]
            expected = expected or tokens
            assert tokens == expected
    _, gap = pool.run(test_engine.answers, 1, str(model), {}, 64, {}, "stale")[0]
    assert gap[0] > 1e-3
