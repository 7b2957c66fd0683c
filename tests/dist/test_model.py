"""The Megatron model is the Hugging Face model: same logits, same weights, under every layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool
from tests.models import tiny_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, {"tp": 2}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "tp4": (4, {"tp": 4}),
    "pp2": (2, {"pp": 2}),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}),
}
LENGTHS = (5, 9, 9, 1)


def logits_and_reexport(directory: str, layout: dict, tokens: list[list[int]], out: str) -> list | None:
    """Packs the sequences, returns their logits from the last stage, and writes the weights out again."""
    import torch.distributed as dist

    from megatron_rl.checkpoint.hf import SafetensorsReader, write_model
    from megatron_rl.models.build import build_model, weight_map
    from megatron_rl.models.exchange import export_weights, import_weights
    from megatron_rl.models.hf_config import load_shape
    from megatron_rl.parallel.mesh import create_mesh
    from tests.dist.forward import packed_logits

    mesh = create_mesh(**layout)
    shape = load_shape(directory)
    reader = SafetensorsReader(directory)
    chunks = build_model(shape, mesh, torch.float32)
    reader.check(weight_map(shape).hf_names())
    import_weights(chunks, reader, mesh)
    write_model(export_weights(chunks, mesh), out, like=directory, write=dist.get_rank() == 0)
    logits = packed_logits(chunks, mesh, tokens)
    return None if logits is None else [x.tolist() for x in logits]


def assert_same_model(
    pool: Pool, directory: Path, layout: tuple[int, dict[str, Any]], out: Path, vocab_size: int = 99
) -> None:
    """`layout`: the number of ranks, and how they are laid out."""
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    world, options = layout
    answers = pool.run(logits_and_reexport, world, str(directory), options, tokens, str(out))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found = next(answer for answer in answers if answer is not None)
    with torch.no_grad():
        for sequence, logits in zip(tokens, found):
            expected = model(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)
    original = load_file(directory / "model.safetensors")
    exported = load_file(out / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert torch.equal(exported[name], tensor), name
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "family, tied", [("llama", False), ("llama", True), ("qwen2", False), ("qwen2", True), ("qwen3", True)]
)
def test_logits_and_weights(pool: Pool, tmp_path: Path, family: str, tied: bool, layout: str) -> None:
    # Qwen3's heads are wider than hidden_size / heads.
    changes = {"head_dim": 12} if family == "qwen3" else {}
    directory = tiny_model(tmp_path / "model", family, tied=tied, **changes)
    assert_same_model(pool, directory, LAYOUTS[layout], tmp_path / "out")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_real_model(pool: Pool, stories: Path, tmp_path: Path, layout: str) -> None:
    assert_same_model(pool, stories, LAYOUTS[layout], tmp_path / "out", 512)


def test_llama3_frequencies(pool: Pool, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    directory = tiny_model(tmp_path / "model", rope_parameters=rope)
    assert_same_model(pool, directory, LAYOUTS["tp2"], tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    config["rope_scaling"] = config.pop("rope_parameters")
    config["rope_theta"] = config["rope_scaling"].pop("rope_theta")
    (directory / "config.json").write_text(json.dumps(config))
    assert_same_model(pool, directory, LAYOUTS["tp2"], tmp_path / "again")
