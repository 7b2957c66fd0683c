"""What is refused of mixtures of experts: layouts that do not divide them, and configs that are not built here."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.launch.torchrun import processes
from megatron_rl.models.hf_config import Experts, check_layout, load_shape
from tests.models import tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny_model(folder / family, family) for family in ("llama", "qwen3_moe", "mixtral")}


def test_experts_are_read(models: dict[str, Path]) -> None:
    assert load_shape(models["qwen3_moe"]).experts == Experts(
        num_experts=4, top_k=2, ffn_hidden_size=48, norm_topk=True
    )
    assert load_shape(models["mixtral"]).experts == Experts(num_experts=4, top_k=2, ffn_hidden_size=96, norm_topk=True)
    assert load_shape(models["llama"]).experts is None
    assert load_shape(models["qwen3_moe"]).identity()["experts"]["top_k"] == 2


@pytest.mark.parametrize(
    ("family", "layout", "said"),
    [
        ("qwen3_moe", {"ep": 3}, "parallel.ep=3 does not divide the model's 4 experts"),
        ("qwen3_moe", {"etp": 5}, "parallel.etp=5 does not divide the experts' MLP size 48"),
        ("qwen3_moe", {"tp": 2}, "parallel.tp=2 in a model with experts needs parallel.sequence_parallel=true"),
        ("llama", {"ep": 2}, "parallel.ep=2, parallel.etp=1: the model has no experts to share out"),
        ("llama", {"etp": 2}, "parallel.ep=1, parallel.etp=2: the model has no experts to share out"),
    ],
)
def test_layouts_that_do_not_divide_the_experts(
    models: dict[str, Path], family: str, layout: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        check_layout(load_shape(models[family]), ParallelConfig(**layout))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ("qwen3_moe", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 .* from 1 to the number of experts, 4"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("mixtral", {"sliding_window": 64}, "sliding_window=64"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts=0: it must be a whole number from 1"),
    ],
)
def test_configs_that_are_not_built(
    models: dict[str, Path], tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    config = json.loads((models[family] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=said):
        load_shape(tmp_path)


def test_ranks_of_a_stage_are_shared_out(tmp_path: Path) -> None:
    """By the config where it says dp; what it leaves open is the least number that can be divided so."""
    config = tmp_path / "config.yaml"
    config.write_text("trainer: sft\nmodel: {path: m}\ndata: {train: x.jsonl}\ntrain: {steps: 1, batch_size: 1}\n")
    with pytest.raises(ConfigError, match=r"parallel\.ep=4 times parallel\.etp=1 must divide the parallel\.tp=1 times"):
        load_config(str(config), ["run.dir=r", "parallel.ep=4", "parallel.dp=2"])
    for overrides, ranks in (
        (["parallel.ep=4"], 4),
        (["parallel.ep=4", "parallel.tp=2"], 4),
        (["parallel.ep=2", "parallel.etp=2", "parallel.pp=2"], 8),
        (["parallel.ep=2", "parallel.tp=4", "parallel.dp=2"], 8),
    ):
        assert processes(load_config(str(config), ["run.dir=r", *overrides]).parallel) == ranks
