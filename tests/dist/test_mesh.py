"""Layouts: coordinates, and what is refused, in the words of the config."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.pool import Pool
from tests.models import tiny_model


def coordinates(**layout: Any) -> tuple[int, int, int, bool]:
    from megatron_rl.parallel.mesh import create_mesh

    mesh = create_mesh(**layout)
    return mesh.tp_rank, mesh.pp_rank, mesh.dp_rank, mesh.is_last_stage


def refusal(**layout: Any) -> str:
    from megatron_rl.parallel.mesh import create_mesh

    try:
        create_mesh(**layout)
    except ValueError as error:
        return str(error)
    return ""


def test_coordinates(pool: Pool) -> None:
    assert pool.run(coordinates, 4, tp=2, pp=2) == [
        (0, 0, 0, False),
        (1, 0, 0, False),
        (0, 1, 0, True),
        (1, 1, 0, True),
    ]
    assert pool.run(coordinates, 4, tp=2, dp=2) == [(0, 0, 0, True), (1, 0, 0, True), (0, 0, 1, True), (1, 0, 1, True)]


def test_worlds_that_do_not_fit(pool: Pool) -> None:
    assert (
        "parallel.tp=2, parallel.pp=1, parallel.dp=None needs a multiple of 2 processes"
        in pool.run(refusal, 1, tp=2)[0]
    )
    assert "needs 4 processes, and this run has 2" in pool.run(refusal, 2, tp=2, dp=2)[0]
    assert "needs parallel.tp > 1" in pool.run(refusal, 1, sequence_parallel=True)[0]


def model_refusals(directory: str) -> list[str]:
    from megatron_rl.config.schema import ParallelConfig
    from megatron_rl.models.build import build_model
    from megatron_rl.models.hf_config import check_layout, load_shape
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.parallel.schedule import run_schedule

    mesh, shape = create_mesh(), load_shape(directory)
    said = []
    for changes in ({"tp": 3}, {"tp": 8}, {"pp": 2, "vpp": 3}, {"pp": 5}):
        with pytest.raises(ValueError) as caught:
            check_layout(shape, ParallelConfig(**changes))
        said.append(str(caught.value))
    chunks = build_model(shape, mesh, torch.float32)
    chunks[0].config.deallocate_pipeline_outputs = True
    with pytest.raises(ValueError) as caught:
        run_schedule(chunks, [None], lambda model, batch: None, mesh=mesh, forward_only=True)  # type: ignore[arg-type, return-value]
    return [*said, str(caught.value)]


def test_models_that_do_not_divide(pool: Pool, tmp_path: Path) -> None:
    """8 heads, 4 key/value heads, 4 layers."""
    heads, kv_heads, chunks, stages, deallocation = pool.run(model_refusals, 1, str(tiny_model(tmp_path / "m")))[0]
    assert heads == "parallel.tp=3 does not divide the model's 8 attention heads"
    assert kv_heads == "parallel.tp=8 does not divide the model's 4 key/value heads"
    assert "makes 6 stages, which do not divide the model's 4 layers" in chunks
    assert "parallel.pp=5 leaves a stage without" in stages
    assert "wrong gradients on gloo" in deallocation
