"""The configs for clusters, checked against models of the sizes that Qwen published, without their weights."""

import json
from pathlib import Path

import pytest

from megatron_rl.cli import main
from tests.models import ascii_tokenizer

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "cluster").glob("*.yaml"))
COMMON = {
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
    "eos_token_id": 2,
}
SIZES = {
    "8b": {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "30b_a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
# What their cards say: 8.2 and 30.5 billion.
PARAMETERS = {"8b": "8,190,735,360", "30b_a3b": "30,532,122,624"}


def size_of(config: Path) -> str:
    (size,) = [size for size in SIZES if f"qwen3_{size}" in config.stem]
    return size


def arguments(config: Path, folder: Path) -> list[str]:
    """`check`, where no model, no vLLM and no teacher's answers are at hand."""
    (folder / "config.json").write_text(json.dumps(COMMON | SIZES[size_of(config)]))
    ascii_tokenizer(folder)
    options = [f"model.path={folder}", "model.weights=random", "rollout.engine=hf"]
    if config.stem.startswith("gad"):
        (folder / "pairs.jsonl").write_text(json.dumps({"prompt": "2+2", "response": "4", "answer": "4"}) + "\n")
        options += [f"data.{name}={folder}/pairs.jsonl" for name in ("train", "val")]
    return ["check", str(config), *options]


@pytest.mark.parametrize("config", CONFIGS, ids=[config.stem for config in CONFIGS])
def test_a_config_goes_with_its_model(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(ROOT)
    assert main(arguments(config, tmp_path)) == 0
    said = capsys.readouterr()
    assert said.err == "" and PARAMETERS[size_of(config)] in said.out


def test_a_layout_that_does_not_go_with_the_model_is_found(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = ROOT / "examples" / "cluster" / "grpo_qwen3_30b_a3b.yaml"
    assert main([*arguments(config, tmp_path), "parallel.tp=8"]) == 2
    assert "parallel.tp=8" in capsys.readouterr().err


@pytest.mark.parametrize("size", SIZES)
def test_there_is_one_for_every_way(size: str) -> None:
    ways = {config.stem.partition("_")[0] for config in CONFIGS if size_of(config) == size}
    assert ways == {"grpo", "gspo", "sdpo", "gad"}
