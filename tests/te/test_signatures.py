"""What the package and megatron-core ask of Transformer Engine, against the installed Python layer."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.dist.pool import Pool

RECORD = json.loads((Path(__file__).parents[1] / "unit" / "te_signatures.json").read_text())["parameters"]


def faults() -> list[str]:
    import transformer_engine.pytorch as te

    from megatron_rl.models import transformer_engine

    return transformer_engine.faults(te)


def faults_of_another() -> list[str]:
    """Of a version that renamed a parameter, and lost a module."""
    import transformer_engine.pytorch as te

    from megatron_rl.models import transformer_engine

    def forward(self: Any, inp: Any, first: Any = None) -> None:
        """As LayerNormLinear's, but for a name."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(te.LayerNormLinear, "forward", forward)
        patch.delattr(te, "GroupedLinear")
        return transformer_engine.faults(te)


def signatures() -> dict[str, list[str]]:
    """Parameters by name, as in the record; what tests/te/references.py stands behind is taken from beneath."""
    import inspect

    import transformer_engine.pytorch as te

    found = {}
    for name in RECORD:
        operator: Any = te
        for part in name.split("."):
            operator = getattr(operator, part)
        operator = getattr(operator, "real", operator)
        taken = inspect.signature(operator.__init__ if inspect.isclass(operator) else operator).parameters.values()
        found[name] = ["**" if p.kind is p.VAR_KEYWORD else p.name for p in taken if p.name != "self"]
    return found


def fused_functions() -> dict[str, str]:
    """Where megatron-core takes its optimizer and its functions over many tensors from."""
    from tests.te.ready import TAKEN

    return {name: f"{function.__module__} {function!r}" for name, function in TAKEN.items()}


def test_nothing_is_missing(pool: Pool) -> None:
    assert pool.run(faults, 1) == [[]]


def test_what_another_version_lacks_is_named(pool: Pool) -> None:
    (found,) = pool.run(faults_of_another, 1)
    assert found == [
        "LayerNormLinear.forward has no parameter is_first_microbatch",
        "GroupedLinear is missing",
        "GroupedLinear.forward is missing",
    ]


def test_the_record_is_that_of_the_installed_version(pool: Pool) -> None:
    """tests/unit holds the package against it, where Transformer Engine is not installed."""
    assert pool.run(signatures, 1) == [RECORD]


def test_the_optimizer_is_taken_from_it(pool: Pool) -> None:
    """Here before the tests put what runs on a CPU in its place; extension functions are the stand-in's."""
    (found,) = pool.run(fused_functions, 1)
    assert found["Adam"].startswith("transformer_engine.pytorch.optimizers")
    assert found["applier"].startswith("transformer_engine.pytorch.optimizers")
    assert "multi_tensor_l2norm" in found["l2norm"] and "multi_tensor_scale" in found["scale"]
