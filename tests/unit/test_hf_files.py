"""Hugging Face directories: sliced reads, whole writes, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_rl.checkpoint.hf import SafetensorsReader, write_model

WEIGHTS = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(5), "c": torch.full((2, 2), 7.0)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    save_file(WEIGHTS, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


@pytest.mark.parametrize("shard_bytes", [2**30, 60])
def test_written_in_shards_read_in_slices(source: Path, tmp_path: Path, shard_bytes: int) -> None:
    out = tmp_path / "out"
    write_model(iter(WEIGHTS.items()), out, like=source, write=True, shard_bytes=shard_bytes)
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 60 else 2)
    assert (out / "model.safetensors.index.json").exists() == (len(files) > 1)
    reader = SafetensorsReader(out)
    reader.check(frozenset(WEIGHTS))
    assert torch.equal(reader.rows("a", 1, 3), WEIGHTS["a"][1:3])
    assert torch.equal(reader.columns("a", 1, 2), WEIGHTS["a"][:, 1:2])
    # Beyond the end there is nothing: padding ranks read empty slices.
    assert reader.rows("a", 3, 9).shape == (1, 3) and reader.rows("a", 8, 12).shape == (0, 3)
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "llama", "dtype": "float32"}
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": [2, 3]}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not list(tmp_path.glob("*.partial"))


def test_ranks_that_do_not_write_drain(source: Path, tmp_path: Path) -> None:
    drained = []
    weights = ((drained.append(name) or name, tensor) for name, tensor in WEIGHTS.items())
    write_model(weights, tmp_path / "out", like=source, write=False)
    assert drained == ["a", "b", "c"] and not (tmp_path / "out").exists()


def test_missing_and_surplus_tensors_are_named(source: Path) -> None:
    reader = SafetensorsReader(source)
    with pytest.raises(ValueError, match="lacks d, e"):
        reader.check(frozenset("abcde"))
    with pytest.raises(ValueError, match="holds b, c, for which"):
        reader.check(frozenset("a"))
    with pytest.raises(ValueError, match="no tensor 'z'"):
        reader.rows("z", 0, 1)


def test_incomplete_directories_are_named(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.path=.* holds no \*.safetensors"):
        SafetensorsReader(tmp_path)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"names model-00001-of-00002\.safetensors, which is not there"):
        SafetensorsReader(source)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"model_type": "mistral"}, "model_type='mistral' is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=true"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window=true"),
        (
            {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "layer_types .* has 'sliding_attention'",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='yarn'"),
    ],
)
def test_models_that_would_be_wrong_are_refused(changes: dict, message: str) -> None:
    from transformers import AutoConfig

    from megatron_rl.models.hf_config import model_shape

    with pytest.raises(ValueError, match=message):
        model_shape(AutoConfig.for_model(**({"model_type": "llama"} | changes)))


def test_no_config_is_said(tmp_path: Path) -> None:
    from megatron_rl.models.hf_config import load_shape

    with pytest.raises(ValueError, match=r"has no config\.json"):
        load_shape(tmp_path)
