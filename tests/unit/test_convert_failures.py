"""Failures that users of other converters report, each planted here. The names say what went wrong there."""

import json
import os
import pickle
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from megatron_rl.checkpoint.manifest import files_of, measure, write_manifest
from megatron_rl.checkpoint.torch_dist import DESCRIPTION, SavedTensors, write_description
from megatron_rl.models.hf_config import load_shape
from tests.models import ascii_tokenizer, tiny_model
from tests.unit.test_convert import assert_equal, change, convert, weights

Refused = Callable[..., str]


def describe_anew(checkpoint: Path, damage: Callable[[SavedTensors], None]) -> None:
    """Writes a description with a fault of its own, under a manifest that fits it."""
    saved = SavedTensors(checkpoint)
    damage(saved)
    write_description(checkpoint, saved.specs, saved.chunks)
    write_manifest(checkpoint, measure(checkpoint, files_of(checkpoint)))


def test_padded_vocabulary_rows_exported(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out", "--tp", 4) == 0
    saved = SavedTensors(tmp_path / "out")
    for key in ("actor.embedding.word_embeddings.weight", "actor.output_layer.weight"):
        assert saved.specs[key].shape == (128, 64)
        padding = torch.ones(29, 64)
        saved.read(key, (), 99, 128, padding)
        assert not padding.any()
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    held = weights(tmp_path / "back")
    assert held["lm_head.weight"].shape == held["model.embed_tokens.weight"].shape == (99, 64)
    assert_equal(tmp_path / "back", model)


def test_tied_output_layer_that_is_not_the_embedding(tmp_path: Path, refused: Refused) -> None:
    """One that is the same may be there, and is not written again; another one would be lost without a word."""
    model = tiny_model(tmp_path / "model", tied=True)
    held = load_file(model / "model.safetensors")
    head = held["model.embed_tokens.weight"].clone()
    save_file(held | {"lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    assert convert("import", model, tmp_path / "out", "--verify", "checksum") == 0
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    assert weights(tmp_path / "back").keys() == held.keys()
    head[98, 63] += 1
    save_file(held | {"lm_head.weight": head}, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("import", model, tmp_path / "out", "--overwrite")
    assert "lm_head.weight is not model.embed_tokens.weight" in said and "tie_word_embeddings" in said


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_expert_key_wrong_and_the_model_far_too_small(tmp_path: Path, refused: Refused, family: str) -> None:
    """Neither a directory nor a checkpoint without its experts is converted; and a whole one has all numbers."""
    model = tiny_model(tmp_path / "model", family)
    assert convert("import", model, tmp_path / "out", "--ep", 2) == 0
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    assert sum(t.numel() for t in weights(tmp_path / "back").values()) == sum(
        t.numel() for t in weights(model).values()
    )
    fc2 = "actor.decoder.layers.mlp.experts.experts.linear_fc2.weight"
    wrong = fc2.replace("experts.experts", "experts.local")

    def rename(saved: SavedTensors) -> None:
        saved.specs[wrong], saved.chunks[wrong] = saved.specs.pop(fc2), saved.chunks.pop(fc2)

    describe_anew(tmp_path / "out", rename)
    said = refused("export", tmp_path / "out", tmp_path / "x")
    assert f"the checkpoint lacks {fc2}" in said and f"nothing takes {wrong}" in said
    assert "no model of the run has such a tensor" in refused("reshard", tmp_path / "out", tmp_path / "x")
    held = {name: t for name, t in weights(model).items() if ".experts.3." not in name}
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("import", model, tmp_path / "x")
    assert "lacks" in said and ".experts.3." in said and "and 9 more" in said


def test_export_of_experts_incomplete_because_a_rank_did_not_save(tmp_path: Path, refused: Refused) -> None:
    model = tiny_model(tmp_path / "model", "qwen3_moe")
    assert convert("import", model, tmp_path / "out", "--ep", 2) == 0
    fc1 = "actor.decoder.layers.mlp.experts.experts.linear_fc1.weight"

    def leave_out(saved: SavedTensors) -> None:
        saved.chunks[fc1] = [chunk for chunk in saved.chunks[fc1] if chunk.region.offset[1] < 2]

    describe_anew(tmp_path / "out", leave_out)
    for verb in ("export", "reshard"):
        said = refused(verb, tmp_path / "out", tmp_path / "x")
        assert f"{fc1} [4, 4, 96, 64] has 98304 elements" in said and "have 49152" in said


def test_generation_config_lost_and_the_model_never_stops(tmp_path: Path) -> None:
    """Two tokens that end an answer, the sampling defaults and the chat template are as they were."""
    model = tiny_model(tmp_path / "model")
    ascii_tokenizer(model)
    GenerationConfig(eos_token_id=[2, 7], bos_token_id=1, do_sample=True, top_p=0.8).save_pretrained(model)
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} <end>")
    assert convert("import", model, tmp_path / "out") == 0
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    assert GenerationConfig.from_pretrained(tmp_path / "back").eos_token_id == [2, 7]
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()


def test_all_ranks_write_the_model(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "start it without torchrun" in refused("import", model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_theta": 10000.0},
    ],
)
def test_scaled_rope_dropped_without_a_word(tmp_path: Path, refused: Refused, rope: dict[str, Any]) -> None:
    model = tiny_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config.pop("rope_parameters")
    (model / "config.json").write_text(json.dumps(config | rope))
    kind = next(iter(rope.values()))["rope_type"]
    for verb in (("plan", model), ("import", model, tmp_path / "out")):
        assert f"rope_type={kind!r} is not supported" in refused(*verb)


def test_llama3_rope_is_exported_as_it_was(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = tiny_model(tmp_path / "model", rope_parameters=rope)
    assert convert("import", model, tmp_path / "out") == 0
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    assert AutoConfig.from_pretrained(tmp_path / "back").rope_parameters == rope
    assert torch.equal(load_shape(tmp_path / "back").inv_freq, load_shape(model).inv_freq)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-6),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("num_hidden_layers", 3),
    ],
)
def test_config_of_the_user_is_not_that_of_the_model(
    tmp_path: Path,
    refused: Refused,
    field: str,
    value: object,
) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out") == 0
    shutil.copytree(model, tmp_path / "other")
    change(tmp_path / "other" / "config.json", **{field: value})
    said = refused("export", tmp_path / "out", tmp_path / "back", "--hf", tmp_path / "other")
    assert "is of another model" in said
    if field == "num_hidden_layers":
        assert "nothing takes model.layers.3." in refused("import", tmp_path / "other", tmp_path / "x")


def test_rarely_used_path_transposes_a_matrix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A square matrix on its side has the right shape. Checksums, differences and logits all find it."""
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out", "--tp", 2) == 0
    assert convert("export", tmp_path / "out", tmp_path / "back", "--verify", "logits") == 0
    assert "100.0% have the same likeliest token" in capsys.readouterr().out
    held = load_file(tmp_path / "back" / "model.safetensors")
    name = "model.layers.2.self_attn.o_proj.weight"
    save_file(
        held | {name: held[name].T.contiguous()}, tmp_path / "back" / "model.safetensors", metadata={"format": "pt"}
    )
    assert convert("verify", tmp_path / "out", tmp_path / "back") == 1
    assert f"{name} has another SHA-256" in capsys.readouterr().out
    assert convert("diff", tmp_path / "out", tmp_path / "back") == 1
    for method in (("--method", "logits"), ("--method", "logits", "--tokens", "16", "--tolerance", "0.01")):
        assert convert("verify", tmp_path / "out", tmp_path / "back", *method) == 1
        assert "NOT the same" in capsys.readouterr().out


def test_export_downloads_the_model_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is gone, and there is no network."""
    model = tiny_model(tmp_path / "model", "qwen3")
    shutil.copytree(model, tmp_path / "kept")
    assert convert("import", model, tmp_path / "out") == 0
    shutil.rmtree(model)

    def no_network(*arguments: object) -> None:
        raise AssertionError("a socket is opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert convert("export", tmp_path / "out", tmp_path / "back", "--verify", "checksum") == 0
    assert_equal(tmp_path / "back", tmp_path / "kept")


def test_value_head_missing(tmp_path: Path, refused: Refused) -> None:
    """A critic goes both ways with its head, and a language model is not made into one without a word."""
    model = tiny_model(tmp_path / "model", tied=True)
    assert "there is no score.weight" in refused("import", model, tmp_path / "out", "--role", "critic")
    held = load_file(model / "model.safetensors") | {"score.weight": torch.randn(1, 64)}
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    change(model / "config.json", architectures=["LlamaForSequenceClassification"], id2label={"0": "value"})
    assert "nothing takes score.weight" in refused("import", model, tmp_path / "out")
    assert convert("import", model, tmp_path / "out", "--role", "critic", "--tp", 2, "--verify", "logits") == 0
    assert SavedTensors(tmp_path / "out").specs["critic.output_layer.weight"].shape == (1, 64)
    assert convert("export", tmp_path / "out", tmp_path / "back", "--verify", "logits") == 0
    assert_equal(tmp_path / "back", model)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "value"}
    # Two labels are no critic.
    save_file(held | {"score.weight": torch.randn(2, 64)}, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("import", model, tmp_path / "x", "--role", "critic")
    assert "score.weight is [2, 64] and the model's config asks for [1, 64]" in said


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_checkpoint_of_a_stranger_runs_code(tmp_path: Path, refused: Refused) -> None:
    """Neither in the description nor in a tensor's bytes."""
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out") == 0
    out, mark = tmp_path / "out", tmp_path / "ran"
    kept = (out / DESCRIPTION).read_bytes()
    (out / DESCRIPTION).write_bytes(pickle.dumps(Bomb(mark)))
    write_manifest(out, measure(out, files_of(out)))
    for verb in (("export", out, tmp_path / "x"), ("reshard", out, tmp_path / "x"), ("inspect", out), ("plan", out)):
        assert "which no checkpoint needs" in refused(*verb)
    (out / DESCRIPTION).write_bytes(kept)
    saved = SavedTensors(out)
    chunk = saved.chunks["actor.decoder.final_layernorm.weight"][0]
    bomb = tmp_path / "bomb"
    torch.save(Bomb(mark), bomb)
    content = bytearray((out / chunk.file).read_bytes())
    content[chunk.offset : chunk.offset + chunk.length] = bomb.read_bytes().ljust(chunk.length, b"\0")[: chunk.length]
    (out / chunk.file).write_bytes(content)
    write_manifest(out, measure(out, files_of(out)))
    assert str(out / chunk.file) in refused("export", out, tmp_path / "x")
    assert not mark.exists()


def test_inspect_starts_no_processes_and_imports_little(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out", "--tp", 2) == 0
    assert not torch.distributed.is_initialized() and "vllm" not in sys.modules
    assert convert("inspect", tmp_path / "out") == 0
    assert "made by convert import" in capsys.readouterr().out
