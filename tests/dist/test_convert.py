"""Imported checkpoints in the real model under every layout, and what runs save exported."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.checkpoint.torch_dist import SavedTensors
from megatron_rl.convert.memory import LARGEST_BLOCK
from tests.dist import test_checkpoint, test_critic
from tests.dist.pool import Pool
from tests.dist.test_average import empty_model
from tests.dist.test_checkpoint import store, weights_of
from tests.dist.test_invariance import make_samples
from tests.dist.test_worker import make_worker, update
from tests.models import tiny_model
from tests.unit.test_convert import assert_equal, convert, weights

SP: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2": (2, SP),
    "tp3": (3, {"tp": 3}),
    "tp4": (4, {"tp": 4}),
    "pp2": (2, {"pp": 2}),
    "pp4": (4, {"pp": 4}),
    "tp2_pp2": (4, SP | {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2}),
    "ep2": (2, {"ep": 2}),
    "tp2_ep2": (2, SP | {"ep": 2}),
    "tp2_ep2_etp2": (4, SP | {"ep": 2, "etp": 2}),
}
LENGTHS = (5, 9, 1)


def tokens_of(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


def load_and_save(directory: str, checkpoint: str, layout: dict, dtype: str, folder: str) -> list | None:
    """Starts a model from an imported checkpoint, gives its logits, and saves it as a run does."""
    from megatron_rl.config.schema import DType, ModelConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.sharded_model import ShardedModel
    from tests.dist.forward import packed_logits

    mesh = create_mesh(**layout)
    model = ShardedModel(ModelConfig(path=directory, weights=checkpoint, dtype=DType(dtype)), mesh)
    store(folder).save(1, {"actor": model}, {})
    logits = packed_logits(model.models, mesh, tokens_of(model.shape.vocab_size)) if mesh.vpp_size == 1 else None
    return None if logits is None else [x.float().tolist() for x in logits]


def options_of(layout: dict[str, Any]) -> list[object]:
    return [part for name, value in layout.items() if name != "sequence_parallel" for part in (f"--{name}", value)]


def regions(checkpoint: Path) -> dict[str, set[Any]]:
    """Where the chunks of each tensor begin, and how large they are."""
    return {key: {chunk.region for chunk in held} for key, held in SavedTensors(checkpoint).chunks.items()}


def assert_converts(pool: Pool, model: Path, layout: str, place: Path, dtype: str = "float32") -> None:
    """Imported for the layout and loaded under it: transformers' logits. Saved and exported: the source's bytes."""
    from transformers import AutoModelForCausalLM

    world, options = LAYOUTS[layout]
    checkpoint = place / "checkpoint"
    assert convert("import", model, checkpoint, *options_of(options)) == 0
    answers = pool.run(
        load_and_save, world, str(checkpoint / "hf"), str(checkpoint), options, dtype, str(place / "run")
    )
    saved = place / "run" / "step_00000001"
    # The keys, shapes, types and chunks are those that megatron-core itself writes under this layout.
    assert SavedTensors(saved).specs == SavedTensors(checkpoint).specs
    held = regions(saved)
    for key, found in regions(checkpoint).items():
        if SavedTensors(saved).specs[key].nbytes < LARGEST_BLOCK:
            assert found == held[key], key
        else:  # written in blocks: each within what one rank has
            assert all(any(part.common(whole) == part for whole in held[key]) for part in found), key
    assert convert("export", saved, place / "out", "--hf", checkpoint / "hf") == 0
    assert_equal(place / "out", model)
    found = next((answer for answer in answers if answer is not None), None)
    if found is None or dtype != "float32":
        return
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for sequence, logits in zip(tokens_of(dense.config.vocab_size), found, strict=True):
            expected = dense(torch.tensor([sequence])).logits[0]
            torch.testing.assert_close(torch.tensor(logits), expected, rtol=0, atol=1e-4)


DENSE = ("tp1", "tp2", "pp2", "tp2_pp2", "pp2_vpp2")
MIXED = (*DENSE, "ep2", "tp2_ep2", "tp2_ep2_etp2")
ALL = [
    (family, tied, dtype, layout)
    for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
    for tied in (False, True)
    for dtype in ("float32", "bfloat16")
    for layout in (MIXED if family in ("qwen3_moe", "mixtral") else DENSE)
]
# One case of each family and of each way of cutting; the rest is the long matrix.
SHORT = {
    ("llama", False, "float32", "tp2_pp2"),
    ("qwen2", True, "float32", "pp2"),
    ("qwen3", True, "bfloat16", "tp2"),
    ("qwen3_moe", False, "float32", "tp2_ep2_etp2"),
    ("mixtral", False, "float32", "tp2_ep2"),
}
CASES = [pytest.param(*case, marks=[pytest.mark.full] * (case not in SHORT)) for case in ALL]


@pytest.mark.parametrize(("family", "tied", "dtype", "layout"), CASES)
def test_imported_loaded_saved_exported(
    pool: Pool, tmp_path: Path, family: str, tied: bool, dtype: str, layout: str
) -> None:
    changes = {"head_dim": 12} if family.startswith("qwen3") else {}
    model = tiny_model(tmp_path / "model", family, tied=tied, dtype=getattr(torch, dtype), **changes)
    assert_converts(pool, model, layout, tmp_path, dtype)


@pytest.mark.parametrize("layout", ["tp2", "tp4", "pp2"])
def test_stories(pool: Pool, stories: Path, tmp_path: Path, layout: str) -> None:
    assert_converts(pool, stories, layout, tmp_path)


@pytest.mark.full
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="set SMOLLM2 to the directory that tools/smollm2.py made")
@pytest.mark.parametrize("layout", ["pp2", "tp3"])
def test_smollm2(pool: Pool, tmp_path: Path, layout: str) -> None:
    assert_converts(pool, Path(os.environ["SMOLLM2"]), layout, tmp_path)


def test_tied_embeddings_on_more_than_two_stages(pool: Pool, tmp_path: Path) -> None:
    assert_converts(pool, tiny_model(tmp_path / "model", "qwen3", tied=True), "pp4", tmp_path)


def resume_tied(directory: str, checkpoint: str, folder: str) -> tuple[Tensor | None, dict[str, Tensor]]:
    """Two updates from an imported checkpoint, a save, a load, an update: this stage's copy of the embedding."""
    from megatron_rl.config.schema import ModelConfig, OptimConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.model_worker import ModelWorker

    config = ModelConfig(path=directory, weights=checkpoint)
    worker = ModelWorker(config, OptimConfig(lr=1e-2, eps=1e-4), create_mesh(pp=2), total_steps=10)
    update(worker), update(worker)
    store(folder).save(2, {"actor": worker}, {})
    store(folder).load(store(folder).latest(), {"actor": worker})
    update(worker)
    store(folder).save(3, {"actor": worker}, {})
    return worker.models[0].head_weight().detach().clone(), weights_of(worker)


def test_tied_output_layer_stays_the_embedding_after_a_resume(pool: Pool, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", tied=True)
    checkpoint = tmp_path / "checkpoint"
    assert convert("import", model, checkpoint, "--tp", 4) == 0
    (first, trained), (last, _) = pool.run(resume_tied, 2, str(model), str(checkpoint), str(tmp_path / "run"))
    assert torch.equal(first, last)
    assert convert("export", tmp_path / "run" / "step_00000003", tmp_path / "out", "--hf", model) == 0
    held = weights(tmp_path / "out")
    assert held.keys() == trained.keys() == weights(model).keys() and "lm_head.weight" not in held
    assert torch.equal(held["model.embed_tokens.weight"], first[:99])
    assert all(torch.equal(held[name], tensor) for name, tensor in trained.items())
    assert not torch.equal(held["model.embed_tokens.weight"], weights(model)["model.embed_tokens.weight"])


def save_roles(directory: str, layout: dict, dtype: str, folder: str) -> dict[str, dict[str, Tensor]]:
    """An actor under training, its average, and its averaged teacher: what each exports by itself."""
    from megatron_rl.config.schema import DType, ModelConfig
    from megatron_rl.config.sdpo import TeacherConfig
    from megatron_rl.workers.average import WeightAverage
    from megatron_rl.workers.teacher import Teacher

    worker = make_worker(directory, layout, dtype, lr=1e-2, eps=1e-4)
    average = WeightAverage(worker, lambda _: 0.5)
    teacher = Teacher(ModelConfig(path=directory, dtype=DType(dtype)), TeacherConfig(rate=0.25), worker)
    for _ in range(2):
        update(worker)
        average.update()
        teacher.average.update()
    teacher.average.write_to(teacher.model)
    state = {"config": {"model": {"path": directory}}}
    store(folder).save(2, {"actor": worker, "average": average, "teacher": teacher}, state)
    written = empty_model(worker, dtype)
    average.write_to(written)
    return {"actor": weights_of(worker), "average": weights_of(written), "teacher": weights_of(teacher.model)}


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("qwen2", "tp2_pp2", "bfloat16"),
        ("qwen3_moe", "tp2_ep2_etp2", "float32"),
        pytest.param("mixtral", "ep2", "bfloat16", marks=pytest.mark.full),
    ],
)
def test_every_role_of_a_run_is_exported(pool: Pool, tmp_path: Path, family: str, layout: str, dtype: str) -> None:
    """A run directory stands for its latest checkpoint, whose config says where tokenizer and config are."""
    model = tiny_model(tmp_path / "model", family, dtype=getattr(torch, dtype))
    world, options = LAYOUTS[layout]
    folder = tmp_path / "run" / "checkpoints"
    roles = pool.run(save_roles, world, str(model), options, dtype, str(folder))[0]
    assert convert("export", tmp_path / "run", tmp_path / "actor", "--verify", "checksum") == 0
    for role in ("average", "teacher"):  # float32, whatever the weights are
        assert convert("export", tmp_path / "run", tmp_path / role, "--role", role, "--dtype", dtype) == 0
    for role, expected in roles.items():
        held = weights(tmp_path / role)
        assert held.keys() == expected.keys()
        assert all(torch.equal(held[key], tensor) for key, tensor in expected.items()), role
    for one, other in (("actor", "average"), ("average", "teacher")):
        moved = [name for name in roles[one] if not torch.equal(roles[one][name], roles[other][name])]
        assert len(moved) > len(roles[one]) // 2
    assert convert("inspect", tmp_path / "run") == 0


def go_on(model: str, layout: dict, path: str) -> tuple:
    """What a checkpoint holds, and a step further: its figures and weights."""
    worker = make_worker(model, layout, **test_checkpoint.OPTIM)
    state = store(str(Path(path).parent)).load(Path(path), {"actor": worker})
    assert (state["step"], worker.version) == (2, 2)
    return update(worker), weights_of(worker)


@pytest.mark.parametrize(
    ("family", "before", "after"),
    [
        ("qwen2", "tp2", "pp2"),
        ("qwen3_moe", "tp2_ep2", "tp2_ep2_etp2"),
        pytest.param("qwen2", "pp2", "tp2_pp2", marks=pytest.mark.full),
        pytest.param("mixtral", "tp2_ep2_etp2", "tp1", marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_from_a_resharded_checkpoint(
    pool: Pool, tmp_path: Path, family: str, before: str, after: str
) -> None:
    """Bit by bit as from the one that it was made of, moments and schedule included."""
    model = str(tiny_model(tmp_path / "model", family, tied=family == "qwen2"))
    world, options = LAYOUTS[before]
    pool.run(test_checkpoint.save_and_go_on, world, model, options, str(tmp_path / "run"), None)
    source, target = tmp_path / "run" / "step_00000002", tmp_path / "resharded" / "step_00000002"
    world, options = LAYOUTS[after]
    assert convert("reshard", source, target, *options_of(options)) == 0
    assert convert("diff", source, target) == 0
    expected = pool.run(go_on, world, model, options, str(source))[0]
    found = pool.run(go_on, world, model, options, str(target))[0]
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


def start(directory: str, layout: dict, weights: str) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    """Weights and log-probabilities of a model that starts from `weights`."""
    from megatron_rl.config.schema import ModelConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.sharded_model import ShardedModel

    model = ShardedModel(ModelConfig(path=directory, weights=weights), create_mesh(**layout))
    samples = make_samples("token-mean")
    return weights_of(model), model.log_probs(samples, model.plan(samples, 48), 1.0)


def test_training_goes_on_from_an_exported_actor(pool: Pool, tmp_path: Path) -> None:
    """As a Hugging Face directory, and imported again: both are the checkpoint."""
    model = tiny_model(tmp_path / "model", "qwen3")
    pool.run(test_checkpoint.save_and_go_on, 2, str(model), {"tp": 2}, str(tmp_path / "run" / "checkpoints"), None)
    assert convert("export", tmp_path / "run", tmp_path / "out", "--hf", model) == 0
    assert convert("import", tmp_path / "out", tmp_path / "again", "--pp", 4) == 0
    expected = pool.run(start, 2, str(model), {"pp": 2}, str(tmp_path / "run"))[0]
    for directory, where in ((tmp_path / "out", "pretrained"), (tmp_path / "again" / "hf", str(tmp_path / "again"))):
        found = pool.run(start, 2, str(directory), {"pp": 2}, where)[0]
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[name], value) for name, value in other.items())
    assert not torch.equal(expected[0]["model.norm.weight"], weights(model)["model.norm.weight"])


def test_a_trained_critic_goes_both_ways(pool: Pool, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", "qwen2", tied=True)
    trained = pool.run(test_critic.save_trained, 2, str(model), str(tmp_path / "critic"))[0]
    saved = tmp_path / "critic" / "step_00000001"
    assert convert("export", saved, tmp_path / "out", "--hf", model) == 0
    assert weights(tmp_path / "out")["score.weight"].shape == (1, 64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert convert("import", tmp_path / "out", tmp_path / "again", "--role", "critic", "--tp", 2) == 0
    for where in (str(saved), str(tmp_path / "again")):
        values = pool.run(test_critic.starts_from, 2, str(model), {"pp": 2}, where)[0]
        for sample_id, value in trained.items():
            torch.testing.assert_close(values[sample_id], value, rtol=0, atol=1e-5)


def refused_start(directory: str, weights: str) -> str:
    with pytest.raises(ValueError) as caught:
        start(directory, {}, weights)
    return str(caught.value)


def test_a_model_of_another_config_does_not_start_from_an_imported_checkpoint(pool: Pool, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "checkpoint") == 0
    other = tiny_model(tmp_path / "other", rms_norm_eps=1e-6)
    said = pool.run(refused_start, 1, str(other), str(tmp_path / "checkpoint"))[0]
    assert "is of another model: norm_eps is 1e-05 there and 1e-06 in model.path" in said
