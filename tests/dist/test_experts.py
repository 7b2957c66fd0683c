"""Mixtures of experts: the model is transformers', and losses, gradients, steps and checkpoints know no layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.dist.pool import Pool
from tests.dist.test_invariance import NARROW, WIDE, difference, gradients
from tests.dist.test_model import assert_same_model
from tests.models import tiny_model

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
FAMILIES = ("qwen3_moe", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_weights(pool: Pool, model: Path, tmp_path: Path, layout: str) -> None:
    assert_same_model(pool, model, LAYOUTS[layout], tmp_path / "out")


@pytest.fixture(scope="module")
def reference(pool: Pool, model: Path) -> dict:
    return pool.run(gradients, 1, str(model), {}, WIDE, False, "float32")[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_agree(pool: Pool, model: Path, reference: dict, layout: str) -> None:
    world, options = LAYOUTS[layout]
    for found in pool.run(gradients, world, str(model), options, NARROW, False, "float32"):
        assert difference(found, reference) < 1e-5
