"""The package's models of Transformer Engine's layers: names, keys, weights in and out, losses and gradients."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_invariance import NARROW, gradients
from tests.dist.test_model import assert_same_model
from tests.dist.test_te_keys import KEYS, names_and_keys
from tests.models import tiny_model
from tests.te.fused import FusedPool, run

SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {"alone": (1, {}), "tp2_sp": (2, SP), "ep2": (2, {"ep": 2})}
DENSE = ("llama", "qwen2", "qwen3")
CASES = [(family, layout) for family in DENSE for layout in ("alone", "tp2_sp")]
CASES += [("qwen3_moe", layout) for layout in LAYOUTS]
# What an optimizer reads of a parameter, and what it takes for granted where nothing is said.
ATTRIBUTES = {"allreduce": True, "sequence_parallel": False, "tensor_model_parallel": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each family; Qwen2's embedding is tied."""
    folder = tmp_path_factory.mktemp("models")
    return {
        family: tiny_model(folder / family, family, tied=family == "qwen2", num_hidden_layers=2)
        for family in (*DENSE, "qwen3_moe")
    }


@pytest.mark.parametrize("family", KEYS)
def test_names_keys_and_shapes_are_those_on_record(fused: FusedPool, tmp_path: Path, family: str) -> None:
    """tests/dist holds the local layers against the same record, where Transformer Engine is not installed."""
    model = str(tiny_model(tmp_path / "model", family, num_hidden_layers=2))
    ((names, keys),) = fused.run(names_and_keys, 1, model, {})
    assert names == KEYS[family]["names"]
    assert keys == KEYS[family]["keys"]


@pytest.mark.parametrize("family, layout", CASES)
def test_it_is_the_model_of_transformers(
    fused: FusedPool, models: dict[str, Path], tmp_path: Path, family: str, layout: str
) -> None:
    """Logits, and every exported weight bit by bit."""
    assert_same_model(fused, models[family], LAYOUTS[layout], tmp_path / "out")  # type: ignore[arg-type]


def measured(
    pool: Pool, fused: bool, model: Path, layout: str
) -> list[dict[str, tuple[float, dict[str, Tensor], float]]]:
    world, options = LAYOUTS[layout]
    return pool.run(run, world, fused, gradients, str(model), options, NARROW, False, "float32")


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to its largest number."""
    assert found.keys() == expected.keys() and all(gradient.any() for gradient in expected.values())
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


@pytest.mark.parametrize("family, layout", CASES)
def test_losses_and_gradients_are_those_of_the_local_layers(
    pool: Pool, models: dict[str, Path], family: str, layout: str
) -> None:
    """Of packed sequences; and the norm that the optimizer clips by, which counts each weight once."""
    local, fused = (measured(pool, kind, models[family], layout) for kind in (False, True))
    for expected, found in zip(local, fused, strict=True):
        for name, (loss, grads, norm) in expected.items():
            assert found[name][0] == pytest.approx(loss, abs=1e-6)
            assert found[name][2] == pytest.approx(norm, rel=1e-5)
            assert apart(found[name][1], grads) < 1e-5


def attributes(directory: str, layout: dict) -> dict[str, dict[str, Any]]:
    from megatron_rl.models.exchange import named_parameters
    from tests.dist.test_worker import make_worker

    parameters = named_parameters(make_worker(directory, layout).models)
    found = {name: {key: getattr(p, key, given) for key, given in ATTRIBUTES.items()} for name, p in parameters}
    for name, marks in found.items():
        if ".mlp.experts." in name:  # whole on their rank, whatever is said; the norm of the gradients shows it
            del marks["tensor_model_parallel"]
    return found


@pytest.mark.parametrize("family, layout", [("qwen3", "tp2_sp"), ("qwen3_moe", "tp2_sp"), ("qwen3_moe", "ep2")])
def test_parameters_are_marked_alike(pool: Pool, models: dict[str, Path], family: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    local, fused = (pool.run(run, world, kind, attributes, str(models[family]), options) for kind in (False, True))
    assert fused == local
    marks = [tuple(mark.values()) for mark in fused[0].values()]
    assert len(set(marks)) > 1


def planted(directory: str, layout: dict, fault: str) -> Any:
    """Gradients of a layer that leaves out its first norm, or whose forward pass takes another parameter."""
    import transformer_engine.pytorch as te

    from tests.te import references

    def without_norm(self: Any, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return references.linear(self, {"inp": inp})

    def renamed(self: Any, inp: Tensor, first: bool | None = None) -> Any:
        return references.layer_norm_linear(self, {"inp": inp})

    with mock.patch.object(te.LayerNormLinear, "forward", without_norm if fault == "norm" else renamed):
        return gradients(directory, layout, NARROW, False, "float32")


def test_a_planted_fault_is_seen(pool: Pool, fused: FusedPool, models: dict[str, Path]) -> None:
    (expected,) = measured(pool, False, models["llama"], "alone")
    (found,) = fused.run(planted, 1, str(models["llama"]), {}, "norm")
    assert apart(found["grpo"][1], expected["grpo"][1]) > 0.1


def test_a_signature_that_changes_is_seen(fused: FusedPool, models: dict[str, Path]) -> None:
    with pytest.raises(AssertionError, match="unexpected keyword argument 'is_first_microbatch'"):
        fused.run(planted, 1, str(models["llama"]), {}, "signature")


def with_local_names(directory: str) -> Any:
    """A model whose weights are looked for as if its parameters were called as the local layers' are."""
    from megatron_rl.models import exchange

    with mock.patch.object(exchange, "canonical_name", lambda name: name):
        return names_and_keys(directory, {})


def test_names_are_made_plain(pool: Pool, fused: FusedPool, models: dict[str, Path]) -> None:
    pool.run(with_local_names, 1, str(models["llama"]))
    with pytest.raises(AssertionError, match=r"no rule maps the Megatron parameter 'decoder.*layer_norm_weight'"):
        fused.run(with_local_names, 1, str(models["llama"]))
