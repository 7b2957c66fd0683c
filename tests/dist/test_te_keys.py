"""Checkpoints of the CPU's layers are those of Transformer Engine's: the same tensors under the same keys."""

import json
from pathlib import Path

import pytest

from tests.dist.pool import Pool
from tests.models import tiny_model

# Written by tools/te_keys.py, which builds the models with Transformer Engine 2.11.0.
KEYS = json.loads((Path(__file__).parent / "te_keys.json").read_text())


def names_and_keys(directory: str, layout: dict) -> tuple[list[str], dict[str, list[int]]]:
    """Of this rank: the parameters' names; key and whole shape of each sharded tensor."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    from megatron_rl.models.exchange import named_parameters
    from tests.dist.test_worker import make_worker

    worker = make_worker(directory, layout)
    tree = worker.sharded_weights()
    apply_factories(tree)
    tensors = [item for item in nested_values(tree) if isinstance(item, ShardedTensor)]
    return (
        sorted(name for name, _ in named_parameters(worker.models)),
        {item.key: list(item.global_shape) for item in tensors},
    )


@pytest.mark.parametrize("family", KEYS)
def test_the_same_keys_and_shapes(pool: Pool, tmp_path: Path, family: str) -> None:
    """A tensor missing on either side would be refused; one under another key would keep what it was drawn as."""
    model = str(tiny_model(tmp_path / "model", family, num_hidden_layers=2))
    ((names, keys),) = pool.run(names_and_keys, 1, model, {})
    assert names == KEYS[family]["names"]
    assert keys == KEYS[family]["keys"]


@pytest.mark.parametrize("layout", [{"ep": 2}, {"etp": 2}], ids=["ep2", "etp2"])
def test_shared_out_experts_have_the_same_keys(pool: Pool, tmp_path: Path, layout: dict) -> None:
    model = str(tiny_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=2))
    for _, keys in pool.run(names_and_keys, 2, model, layout):
        assert keys == KEYS["qwen3_moe"]["keys"]


def test_experts_norm_has_its_own_key() -> None:
    """megatron-core would write it on the CPU as if it were fused into a linear layer, which experts do not have."""
    assert "decoder.layers.pre_mlp_layernorm.weight" in KEYS["mixtral"]["keys"]
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in KEYS["llama"]["keys"]
