"""Conversions give back what they were given, bit for bit, and refuse what they cannot."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rl.checkpoint.torch_dist import Chunk, Region, SavedTensors, Spec, write_description
from megatron_rl.cli import main
from megatron_rl.convert.memory import size
from megatron_rl.convert.rows import blocks, clipped, of_source
from megatron_rl.convert.table import Layout, table
from megatron_rl.models.build import weight_map
from megatron_rl.models.hf_config import load_shape
from megatron_rl.trainers.evaluation_config import evaluation_config
from tests.models import ascii_tokenizer, tiny_model, tiny_tokenizer
from tests.unit.test_hf_map import CASES, GEOMETRY, Tensors


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments)])


def weights(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found: Path, expected: Path) -> None:
    one, other = weights(found), weights(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_the_weight_map(case: str) -> None:
    """Unsharded, what `read` puts together is what the runs say, whole and in blocks; and back."""
    kind, tensors = CASES[case]
    names = tuple(tensors)
    rows = 112 if case == "vocabulary" else sum(tensor.shape[0] for tensor in tensors.values())
    expected = kind.read(Tensors(**tensors), names, 0, 1, rows, GEOMETRY)
    runs = kind.runs(rows, GEOMETRY)
    found = torch.zeros_like(expected)
    for start, stop in blocks(rows, 1, 7):
        for run in clipped(runs, start, stop):
            found[run.at : run.at + run.rows] = tensors[names[run.source]][run.start : run.start + run.rows]
    assert torch.equal(found, expected)
    for source, tensor in enumerate(tensors.values()):
        back = torch.full_like(tensor, torch.nan)
        for start, stop in blocks(tensor.shape[0], 1, 5):
            for run in of_source(runs, source, start, stop):
                back[run.start : run.start + run.rows] = expected[run.at : run.at + run.rows]
        assert torch.equal(back, tensor)


def test_stages_of_layers() -> None:
    """Where stages do not divide the layers the last has fewer; interleaved ones take turns."""
    assert [Layout(pp=2).stage_of(layer, 5) for layer in range(5)] == [0, 0, 0, 1, 1]
    assert [Layout(pp=2, vpp=2).stage_of(layer, 8) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [Layout(pp=3, vpp=1).stage_of(layer, 6) for layer in range(6)] == [0, 0, 1, 1, 2, 2]


def test_blocks_keep_to_their_part() -> None:
    assert list(blocks(10, 4, 12, 2)) == [(0, 3), (3, 5), (5, 8), (8, 10)]
    assert list(blocks(3, 100, 1)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_the_table_has_the_tensors_of_the_weight_map(tmp_path: Path, family: str) -> None:
    shape = load_shape(tiny_model(tmp_path / "model", family))
    lines = table(shape, Layout(tp=2))
    names = [name for line in lines for index in line.indices() for name in line.hf(index)]
    assert len(set(names)) == len(names) and set(names) == weight_map(shape).hf_names()


FAMILIES = [
    ("llama", False, "float32", Layout(tp=2)),
    ("llama", True, "bfloat16", Layout(tp=4, pp=2)),
    ("qwen2", True, "bfloat16", Layout(tp=2, pp=4)),
    ("qwen3", True, "float32", Layout(tp=2, pp=2, vpp=2)),
    ("qwen3_moe", False, "bfloat16", Layout(tp=2, ep=2, etp=2)),
    ("qwen3_moe", True, "float32", Layout(pp=2, ep=4)),
    ("mixtral", False, "float32", Layout(tp=2, ep=2)),
]


def layout_options(layout: Layout) -> list[object]:
    return [part for name in Layout.__dataclass_fields__ for part in (f"--{name}", getattr(layout, name))]


@pytest.mark.parametrize("family, tied, dtype, layout", FAMILIES)
def test_round_trip(tmp_path: Path, family: str, tied: bool, dtype: str, layout: Layout) -> None:
    """A vocabulary of 99 divides by neither 2 nor 4 ranks. Sharded and whole, in and out."""
    changes = {"head_dim": 12} if family.startswith("qwen3") else {}
    model = tiny_model(tmp_path / "model", family, tied=tied, dtype=getattr(torch, dtype), **changes)
    ascii_tokenizer(model)
    assert convert("import", model, tmp_path / "once", *layout_options(layout)) == 0
    assert convert("export", tmp_path / "once", tmp_path / "sharded", "--max-shard-size", "50KB") == 0
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and index["metadata"]["total_size"] == sum(t.nbytes for t in weights(model).values())
    assert all((tmp_path / "sharded" / name).is_file() for name in files)
    assert_equal(tmp_path / "sharded", model)
    assert convert("import", tmp_path / "sharded", tmp_path / "twice", "--verify", "checksum") == 0
    assert convert("export", tmp_path / "twice", tmp_path / "whole", "--verify", "checksum") == 0
    assert_equal(tmp_path / "whole", model)
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == dtype
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (model / name).read_bytes(), name
    made = [json.loads((tmp_path / name / "conversion.json").read_text()) for name in ("twice", "whole")]
    assert made[0]["tensors"] == made[1]["tensors"] and made[0]["sha256"] == made[1]["sha256"]
    assert made[0]["versions"].keys() == {"megatron_rl", "megatron-core", "torch", "transformers", "safetensors"}


def test_a_type_that_is_asked_for(tmp_path: Path) -> None:
    """Widened and narrowed again a tensor is what it was; narrowed it is rounded to the nearest."""
    model = tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    assert convert("import", model, tmp_path / "wide", "--dtype", "float32", "--verify", "checksum") == 0
    assert {spec.dtype for spec in SavedTensors(tmp_path / "wide").specs.values()} == {torch.float32}
    assert convert("export", tmp_path / "wide", tmp_path / "back", "--dtype", "bfloat16") == 0
    assert_equal(tmp_path / "back", model)
    assert convert("export", tmp_path / "wide", tmp_path / "half", "--dtype", "float16") == 0
    held, half = weights(model), weights(tmp_path / "half")
    assert all(torch.equal(half[name], tensor.to(torch.float16)) for name, tensor in held.items())


def test_types_that_differ_within_a_tensor_are_refused_unless_one_is_asked_for(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    model = tiny_model(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(held | {name: held[name].bfloat16()}, model / "model.safetensors", metadata={"format": "pt"})
    assert "are stored as bfloat16, float32: choose one with --dtype" in refused("import", model, tmp_path / "out")
    assert convert("import", model, tmp_path / "out", "--dtype", "float32", "--verify", "checksum") == 0


def test_chunks_are_those_that_ranks_read(tmp_path: Path) -> None:
    """No chunk crosses a rank's border, so that none reads more than it keeps."""
    model = tiny_model(tmp_path / "model", "qwen3_moe")
    assert convert("import", model, tmp_path / "out", "--tp", 2, "--pp", 2, "--ep", 2, "--etp", 2) == 0
    saved = SavedTensors(tmp_path / "out")
    experts = saved.chunks["actor.decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert {chunk.region.sizes for chunk in experts} == {(1, 1, 24, 64)}
    columns = saved.chunks["actor.decoder.layers.self_attention.linear_proj.weight"]
    assert {chunk.region.sizes for chunk in columns} == {(1, 64, 32)}
    # A file has the tensors of one stage and one expert-parallel rank.
    ranks = {(chunk.region.offset[0] // 2, chunk.region.offset[1] // 2, chunk.file) for chunk in experts}
    assert len(ranks) == 4 and len({file for *_, file in ranks}) == 4


def test_whole_tensors_come_from_any_chunks(tmp_path: Path) -> None:
    """Rows across chunks of rows, of columns and of both, and of a stack that lies in one chunk."""
    whole = torch.arange(2 * 6 * 8, dtype=torch.float32).view(2, 6, 8)
    cuts = [((0, 0, 0), (2, 4, 3)), ((0, 0, 3), (1, 6, 5)), ((0, 4, 0), (2, 2, 3)), ((1, 0, 3), (1, 6, 5))]
    chunks = []
    with (tmp_path / "a.distcp").open("wb") as file:
        for offset, sizes in cuts:
            begin, region = file.tell(), Region(offset, sizes)
            torch.save(whole[region.inside(Region((0, 0, 0), (2, 6, 8)))].clone(), file)
            chunks.append(Chunk(region, "a.distcp", begin, file.tell() - begin))
    write_description(tmp_path, {"x": Spec(torch.float32, (2, 6, 8))}, {"x": chunks})
    saved = SavedTensors(tmp_path)
    saved.check_whole("x")
    for layer in range(2):
        for start in range(6):
            for stop in range(start + 1, 7):
                for dtype in (torch.float32, torch.float64):
                    out = torch.full((stop - start, 8), -1, dtype=dtype)
                    saved.read("x", (layer,), start, stop, out)
                    assert torch.equal(out, whole[layer, start:stop].to(dtype))


def test_plan_reads_headers_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tensors' bytes are cut off, and the plan is still there."""
    model = tiny_model(tmp_path / "model", "qwen3_moe", tied=True)
    file = model / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    content = bytearray(file.read_bytes())
    content[8 + length :] = bytes(len(content) - 8 - length)
    file.write_bytes(content)
    options = ("--tp", 2, "--pp", 2, "--ep", 2)
    assert convert("plan", model, *options, "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    rows = {row["tensor"]: row for row in plan["tensors"]}
    fc1 = rows["actor.decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert (fc1["rule"], fc1["shape"], fc1["slice"]) == ("gated linear", [4, 4, 96, 64], [96, 64])
    assert fc1["bytes"] == 4 * 4 * 4 * 96 * 64
    assert rows["actor.embedding.word_embeddings.weight"]["slice"] == [64, 64]
    # Of a rank on the last stage: two layers, half of attention and embedding, two of four experts.
    layer = 64 + 64 + 64 * 64 + 64 * 32 + 8 + 8 + 4 * 64 + 2 * (96 * 64 + 64 * 48)
    assert plan["totals"]["bytes_per_rank"] == [4 * (2 * layer + 64 * 64), 4 * (2 * layer + 64 * 64 + 64)]
    assert plan["totals"]["output_bytes"] == sum(row["bytes"] for row in plan["tensors"])
    assert plan["totals"]["parameters"] == sum(tensor.numel() for tensor in weights(model).values())
    assert convert("plan", model, *options) == 0
    said = capsys.readouterr().out
    assert "gated linear  actor.decoder.layers.mlp.experts.experts.linear_fc1.weight" in said
    assert "4x4x96x64" in said and "mlp.experts.{expert}.gate_proj.weight + " in said


def test_plan_names_what_fits_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """On both sides, with exit code 2 and the table all the same."""
    model = tiny_model(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    held["model.layers.9.mlp.up_proj.weight"] = held.pop("model.layers.2.mlp.up_proj.weight")
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("plan", model)
    assert "lacks model.layers.2.mlp.up_proj.weight, which decoder.layers.mlp.linear_fc1.weight is made of" in said
    assert "nothing takes model.layers.9.mlp.up_proj.weight [96, 64]" in said
    assert convert("plan", model, "--json") == 2
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 2


def test_unknown_tensors_are_errors_unless_allowed_by_name(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = tiny_model(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    save_file(held | {"extra.weight": torch.ones(3)}, model / "model.safetensors", metadata={"format": "pt"})
    said = refused("import", model, tmp_path / "out")
    assert "nothing takes extra.weight [3]; leave it out with --allow extra.weight" in said
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert "the directory holds no such tensor" in refused("import", model, tmp_path / "out", "--allow", "extra")
    assert convert("import", model, tmp_path / "out", "--allow", "extra.weight", "--verify", "checksum") == 0
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["allowed"] == ["extra.weight"]
    assert convert("export", tmp_path / "out", tmp_path / "back") == 0
    assert weights(tmp_path / "back").keys() == held.keys()


def test_what_is_no_float_is_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = tiny_model(tmp_path / "model")
    held = load_file(model / "model.safetensors")
    ids = {"model.position_ids": torch.arange(9)}
    save_file(held | ids, model / "model.safetensors", metadata={"format": "pt"})
    assert "nothing takes model.position_ids [9]" in refused("plan", model)
    assert convert("import", model, tmp_path / "out", "--allow", "model.position_ids") == 0
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.int8)
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight is stored as int8; F32, BF16, F16 can be converted" in refused("plan", model)


def test_an_imported_checkpoint_is_evaluated_and_not_continued(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_tokenizer(tiny_model(tmp_path / "model"), 99)
    out, data = tmp_path / "out", tmp_path / "rows.jsonl"
    assert convert("import", model, out) == 0
    data.write_text('{"prompt": "w5", "answer": "1"}\n')
    loaded = evaluation_config(str(out), str(data))
    assert (loaded.config.model.path, loaded.config.model.weights) == (str(out / "hf"), str(out))
    (tmp_path / "c.yaml").write_text(
        f"trainer: grpo\nmodel: {{path: {model}}}\ndata: {{train: {data}}}\ntrain: {{steps: 1, batch_size: 1}}\n"
        f"run: {{dir: {tmp_path}/run}}\ncheckpoint: {{load: {out}}}\n"
    )
    capsys.readouterr()
    assert main(["check", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "start from them with model.weights" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tp", 3), "does not divide the model's 8 attention heads"),
        (("--tp", 0), "--tp must be at least 1"),
        (("--ep", 2), "no experts to share out"),
        (("--pp", 8), "leaves a stage without one of the model's 4 layers"),
        (("--max-memory", "300"), "too little"),
        (("--max-memory", "300 bananas"), "is no size: write 300MB"),
        (("--role", "teacher"), "a Hugging Face directory becomes an actor or a critic"),
        (("--role", "critic"), "there is no score.weight, the head of a critic"),
    ],
)
def test_mistakes(tmp_path: Path, refused: Callable[..., str], arguments: tuple, said: str) -> None:
    model = tiny_model(tmp_path / "model")
    assert said in refused("import", model, tmp_path / "out", *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_places_that_are_wrong(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out") == 0
    assert "replace it with --overwrite" in refused("import", model, tmp_path / "out")
    assert "takes a checkpoint or a run: use import" in refused("export", model, tmp_path / "x")
    assert "import takes a Hugging Face directory: use export" in refused("import", tmp_path / "out", tmp_path / "x")
    assert "is no directory" in refused("inspect", tmp_path / "nowhere")
    assert "has no 'teacher': --role is one of actor" in refused(
        "export", tmp_path / "out", tmp_path / "x", "--role", "teacher"
    )
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    assert convert("import", model, tmp_path / "out", "--overwrite", "--tp", 2) == 0
    assert (tmp_path / "out" / "manifest.json").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_damaged_files_are_refused_by_name(tmp_path: Path, refused: Callable[..., str]) -> None:
    model = tiny_model(tmp_path / "model")
    assert convert("import", model, tmp_path / "out") == 0
    for verb in ("export", "reshard"):
        for name in ("__0_0.distcp", ".metadata"):
            path = tmp_path / "out" / name
            content = path.read_bytes()
            path.write_bytes(
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 1])
                + content[len(content) // 2 + 1 :]
            )
            assert str(path) in refused(verb, tmp_path / "out", tmp_path / "x")
            path.write_bytes(content[:-1])
            assert f"{path} has {len(content) - 1} bytes" in refused(verb, tmp_path / "out", tmp_path / "x")
            path.write_bytes(content)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-5])
    assert "is damaged or no safetensors file" in refused("import", model, tmp_path / "y")


def test_diff_and_verify_find_one_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tmp_path / "model", "qwen2")
    shutil.copytree(model, tmp_path / "other")
    assert convert("diff", model, tmp_path / "other") == 0 and convert("verify", model, tmp_path / "other") == 0
    held = load_file(model / "model.safetensors")
    held["model.layers.3.self_attn.k_proj.bias"][5] += 0.25
    held["model.norm.weight"] = held["model.norm.weight"].bfloat16()
    del held["lm_head.weight"]
    save_file(held, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert convert("diff", model, tmp_path / "other", "--json") == 1
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out) if row["name"] != "model.norm.weight"}
    assert found["model.layers.3.self_attn.k_proj.bias"]["largest"] == pytest.approx(0.25, rel=1e-5)
    assert found["lm_head.weight"]["what"] == "only in the first" and len(found) == 2
    assert convert("verify", model, tmp_path / "other") == 1
    said = capsys.readouterr().out
    assert "model.layers.3.self_attn.k_proj.bias has another SHA-256" in said and "NOT the same" in said
    # Through a checkpoint the same one number is found.
    assert convert("import", model, tmp_path / "checkpoint", "--tp", 2) == 0
    assert convert("diff", tmp_path / "checkpoint", model) == 0
    assert convert("diff", tmp_path / "checkpoint", tmp_path / "other") == 1
    assert "k_proj.bias: values differ by at most 0.25" in capsys.readouterr().out


def test_reshard_changes_chunks_and_no_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_tokenizer(tiny_model(tmp_path / "model", "qwen3_moe"), 99)
    assert convert("import", model, tmp_path / "one", "--tp", 4) == 0
    assert convert("reshard", tmp_path / "one", tmp_path / "two", "--pp", 2, "--ep", 4, "--etp", 2) == 0
    one, two = SavedTensors(tmp_path / "one"), SavedTensors(tmp_path / "two")
    assert one.chunks.keys() == two.chunks.keys()
    assert one.specs["actor.output_layer.weight"].shape == (128, 64)
    assert two.specs["actor.output_layer.weight"].shape == (112, 64)
    assert convert("diff", tmp_path / "one", tmp_path / "two") == 0
    assert convert("export", tmp_path / "two", tmp_path / "out") == 0
    assert_equal(tmp_path / "out", model)
    capsys.readouterr()
    assert convert("inspect", tmp_path / "two", "--json") == 0
    held = json.loads(capsys.readouterr().out)
    assert held["layout"] == {"tp": 1, "pp": 2, "vpp": 1, "ep": 4, "etp": 2} and held["step"] == 0
    assert held["conversion"]["before"]["verb"] == "import" and held["models"]["actor"]["family"] == "qwen3_moe"
    assert convert("plan", tmp_path / "two", "--dtype", "bfloat16", "--json") == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert totals["parameters"] == sum(tensor.numel() for tensor in weights(model).values())
    assert convert("inspect", tmp_path / "out", "--tensors") == 0
    assert "model.layers.3.mlp.experts.2.up_proj.weight float32 [48, 64]" in capsys.readouterr().out


def test_sizes() -> None:
    assert [size(text) for text in ("300MB", "5 GiB", "1.5kb", "12")] == [300_000_000, 5 * 2**30, 1500, 12]
    for text in ("", "MB", "-1GB", "0GB", "3 apples"):
        with pytest.raises(ValueError, match="is no size"):
            size(text)
