"""Checkpoints cross between Transformer Engine's layers and the local ones, at megatron-core's default strictness."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_checkpoint import OPTIM, save_and_go_on, store
from tests.dist.test_worker import make_worker, update
from tests.models import tiny_model
from tests.te.fused import run

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "llama": (1, {}),
    "qwen3": (2, {"tp": 2, "sequence_parallel": True}),
    "qwen3_moe": (2, {"ep": 2}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: str(tiny_model(folder / family, family, num_hidden_layers=2)) for family in LAYOUTS}


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True], ids=["local_to_fused", "fused_to_local"])
def test_a_run_goes_on_with_the_other_layers(
    pool: Pool, models: dict[str, str], tmp_path: Path, family: str, fused: bool
) -> None:
    """Weights and Adam's moments: what the next step does with them, on either side, and each weight after it."""
    world, layout = LAYOUTS[family]
    model, here, there = models[family], str(tmp_path / "here"), str(tmp_path / "there")
    expected = pool.run(run, world, fused, save_and_go_on, model, layout, here, None)
    found = pool.run(run, world, not fused, save_and_go_on, model, layout, there, here)
    for (figures, weights), (others, other_weights) in zip(expected, found, strict=True):
        assert others == pytest.approx(figures, rel=1e-4)
        assert weights.keys() == other_weights.keys()
        for name, weight in weights.items():
            assert (other_weights[name] - weight).abs().max() < 2e-6, name


def saved_and_loaded(model: str, layout: dict, directory: str, saving: bool) -> dict[str, Tensor]:
    """Every tensor of the weights, as it lies on this rank; those that are loaded were drawn anew before."""
    worker = make_worker(model, layout, **OPTIM)
    if saving:
        update(worker)
        store(directory).save(1, {"actor": worker}, {})
    else:
        with torch.no_grad():
            for chunk in worker.models:
                for parameter in chunk.parameters():
                    parameter.fill_(-7.0)
        store(directory).load(store(directory).latest(), {"actor": worker})
    return {name: value.clone() for name, value in worker.named_hf_weights()}


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True], ids=["local_to_fused", "fused_to_local"])
def test_every_tensor_arrives(pool: Pool, models: dict[str, str], tmp_path: Path, family: str, fused: bool) -> None:
    world, layout = LAYOUTS[family]
    saved = pool.run(run, world, fused, saved_and_loaded, models[family], layout, str(tmp_path), True)
    loaded = pool.run(run, world, not fused, saved_and_loaded, models[family], layout, str(tmp_path), False)
    for expected, found in zip(saved, loaded, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def unrepaired(model: str, directory: str, repair: str, saving: bool) -> Any:
    """As `saved_and_loaded`, without one of the repairs."""
    from megatron.core.models.gpt import gpt_layer_specs

    from megatron_rl.models import layer_specs
    from megatron_rl.workers import sharded_model

    def keys_as_shipped(*args: Any, **kwargs: Any) -> Any:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(*args, **kwargs)
        spec.submodules.sharded_state_dict_keys_map = Kept(spec.submodules.sharded_state_dict_keys_map)
        return spec

    class Kept(dict):
        def pop(self, *_: Any) -> None:
            """The norm before the experts keeps the key of a fused layer."""

    with pytest.MonkeyPatch.context() as patch:
        if repair == "key":
            patch.setattr(layer_specs, "get_gpt_layer_local_spec", keys_as_shipped)
        if repair == "extra":
            patch.setattr(sharded_model, "_is_extra", lambda name: False)
        if repair == "numbered":
            patch.setattr(sharded_model, "_is_extra", lambda name: name.endswith("_extra_state"))
        return saved_and_loaded(model, {}, directory, saving)


@pytest.mark.parametrize(
    "family, repair, lacking",
    [
        ("qwen3_moe", "key", "pre_mlp_layernorm"),
        ("qwen3", "extra", "_extra_state"),
        ("qwen3_moe", "extra", "_extra_state"),
        ("qwen3_moe", "numbered", "_extra_state"),
    ],
)
def test_without_a_repair_it_is_refused(
    pool: Pool, models: dict[str, str], tmp_path: Path, family: str, repair: str, lacking: str
) -> None:
    """The key of the norm before experts; extra state, which more modules have with Transformer Engine than without."""
    saving, loading = (repair, "") if repair == "key" else ("", repair)
    pool.run(run, 1, False, unrepaired, models[family], str(tmp_path), saving, True)
    with pytest.raises(AssertionError, match=f"does not fit this run: .*{lacking}"):
        pool.run(run, 1, True, unrepaired, models[family], str(tmp_path), loading, False)
