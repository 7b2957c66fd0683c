"""The model of a step's time: closed forms, limits, what must not grow or shrink, and units."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.activations import Build
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.machine import H100, H200, Machine
from megatron_rl.planning.parameters import model_parameters, trained_model
from megatron_rl.planning.schedule import longest_step, schedule
from megatron_rl.planning.speed import (
    Batch,
    Model,
    Seconds,
    forward_seconds,
    head_seconds,
    layer_bytes_moved,
    layer_flops,
    layer_seconds,
    model_flops,
    optimizer_seconds,
    stage_seconds,
    update_seconds,
)
from megatron_rl.planning.step_time import decode_seconds, describe_step, generation_seconds, step_seconds, sync_seconds

ROOT = Path(__file__).parents[2]
# Everything but products is free.
IDEAL = Machine(
    products=1e12,
    attention=float("inf"),
    memory=float("inf"),
    link=float("inf"),
    link_latency=0.0,
    network=float("inf"),
    network_latency=0.0,
    node=8,
)
BATCH = Batch(tokens=8192.0, loss_tokens=6144.0, squares=2 * 4096.0**2)


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("size_cluster", ROOT / "tools" / "size_cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shape(sizing: ModuleType) -> ModelShape:
    return sizing.shape_of(sizing.MODELS["Qwen3-8B"])


def model(shape: ModelShape, machine: Machine = H100, **layout: int | bool) -> Model:
    return Model(shape=shape, layout=Layout(**layout), machine=machine, width=2)


def test_one_rank_takes_flops_by_rate(shape: ModelShape) -> None:
    """6 FLOPs for each weight of a matrix and token; the head's on loss-bearing tokens, computed again once more."""
    body = model_parameters(shape) - 2 * shape.vocab_size * shape.hidden_size
    norms = shape.num_layers * (2 * shape.hidden_size + 2 * shape.head_dim) + shape.hidden_size
    head = shape.vocab_size * shape.hidden_size
    expected = 5 * (6 * (body - norms) * BATCH.tokens + 8 * head * BATCH.loss_tokens) / 1e12
    assert update_seconds(model(shape, IDEAL), BATCH, 5).total == pytest.approx(expected, rel=1e-3)
    # What MFU counts has no recomputation, and attention beside the products.
    squares = 6 * shape.num_layers * shape.num_heads * shape.head_dim * BATCH.squares
    counted = 6 * (body - norms) * BATCH.tokens + 6 * head * BATCH.loss_tokens + squares
    assert model_flops(shape, BATCH.tokens, BATCH.loss_tokens, BATCH.squares) == pytest.approx(counted)


def test_ideal_layouts_divide_the_work(shape: ModelShape) -> None:
    """Without communication tp divides every product, and a pipeline all of it but its bubble."""
    whole = update_seconds(model(shape, IDEAL), BATCH, 8).total
    assert update_seconds(model(shape, IDEAL, tp=8), BATCH, 8).total == pytest.approx(whole / 8, rel=1e-3)
    stages = update_seconds(model(shape, IDEAL, pp=4), BATCH, 8)
    body = layer_seconds(model(shape, IDEAL), BATCH)
    of_stage = 9 * (body[0] + body[1]).total
    head = sum(part.total for part in head_seconds(model(shape, IDEAL), BATCH))
    assert stages["bubble"] == pytest.approx(3 * of_stage)
    assert stages.total == pytest.approx(8 * (of_stage + head) + 3 * of_stage)


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(2, 1, 4), (4, 1, 16), (4, 3, 8)])
def test_the_bubble_of_equal_stages(shape: ModelShape, pp: int, vpp: int, micro_batches: int) -> None:
    """(pp - 1) / (M vpp) of the rest, as schedule() has it as a share of the whole."""
    headless = shape.as_scalar()
    found = update_seconds(model(headless, IDEAL, pp=pp, vpp=vpp), BATCH, micro_batches)
    bubble = found["bubble"]
    assert bubble / (found.total - bubble) == pytest.approx((pp - 1) / (micro_batches * vpp))
    assert bubble / found.total == pytest.approx((pp - 1) / (pp - 1 + micro_batches * vpp))


def test_bytes_over_links() -> None:
    machine = replace(IDEAL, link=100.0, link_latency=0.5, network=10.0, network_latency=2.0, node=4)
    assert machine.send(50, 4) == 1.0 and machine.send(50, 5) == 7.0
    assert machine.gather(400, 4, 4) == 3 * (0.5 + 1.0) and machine.gather(400, 1, 1) == 0
    assert machine.reduce(400, 4, 4) == 2 * machine.gather(400, 4, 4)


def test_tensor_parallel_exchange(shape: ModelShape) -> None:
    """Four passages of e T H (tp - 1) / tp each way, and under sequence parallelism two more backward."""
    machine = replace(IDEAL, link=1e9)
    stream = 2 * BATCH.tokens * shape.hidden_size * 3 / 4 / 1e9
    for sequence_parallel, backward in ((False, 4), (True, 6)):
        passes = layer_seconds(model(shape, machine, tp=4, sequence_parallel=sequence_parallel), BATCH)
        assert [part["tensor parallel"] for part in passes] == pytest.approx([4 * stream, backward * stream])
    again = layer_seconds(model(shape, machine, tp=4, sequence_parallel=True, recompute=True), BATCH)[1]
    assert again["tensor parallel"] == pytest.approx(10 * stream)
    assert again["products"] == pytest.approx(3 * layer_flops(shape, Layout(tp=4), BATCH.tokens) / 1e12)


def test_data_parallel_exchange_and_adam(shape: ModelShape) -> None:
    """4 P and 2 P bytes by (d - 1) / d over the network, beyond a node; Adam's state is shared out, the rest is not."""
    layout = Layout(tp=2, dp=8)
    parameters = trained_model(shape, layout, 0, 2).weights / 2
    machine = replace(IDEAL, network=1e9, memory=1e9)
    found = optimizer_seconds(Model(shape=shape, layout=layout, machine=machine, width=2), 0)
    assert found["gradients"] == pytest.approx(4 * parameters * 7 / 8 / 1e9)
    assert found["weights"] == pytest.approx(2 * parameters * 7 / 8 / 1e9)
    assert found["optimizer"] == pytest.approx((8 + (16 + 24 + 2) / 8) * parameters / 1e9)
    # Within a node the links between its devices count.
    inside = replace(machine, link=2e9, node=16)
    assert optimizer_seconds(Model(shape=shape, layout=layout, machine=inside, width=2), 0)["gradients"] == (
        pytest.approx(found["gradients"] / 2)
    )


def test_memory_of_a_layer(shape: ModelShape) -> None:
    tokens, hidden, heads, ffn = 1000.0, 4096, 40 * 128, 12288
    here = model(shape, tp=2, sequence_parallel=True)
    assert layer_bytes_moved(here, tokens) == 2 * tokens * (10 * hidden / 2 + 2 * heads / 2 + 3 * ffn / 2)
    local = replace(here, build=Build.local, width=4)
    assert layer_bytes_moved(local, tokens) == 4 * tokens * (20 * hidden / 2 + 7 * heads / 2 + 5 * ffn / 2)


def test_more_is_never_faster(shape: ModelShape) -> None:
    def took(machine: Machine = H100, micro_batches: int = 8, **layout: int | bool) -> float:
        return update_seconds(model(shape, machine, **layout), BATCH, micro_batches).total

    assert took(tp=2) > took(tp=4) > took(tp=8) > took() / 8
    assert took(tp=16) > took(tp=8) / 2, "beyond a node the network is in the way"
    assert took(tp=8, recompute=True) > took(tp=8) and took(micro_batches=9) > took()
    assert took(pp=4, micro_batches=8) / 8 > took(pp=4, micro_batches=64) / 64
    assert took(pp=4) > took(pp=4, vpp=3) and took(dp=64) > took()
    slower = {name: getattr(H100, name) / 2 for name in ("products", "attention", "memory", "link", "network")}
    for name, rate in slower.items():
        assert took(replace(H100, **{name: rate}), tp=4, dp=8) > took(tp=4, dp=8), name
    assert took(H200) < took(H100)
    assert forward_seconds(model(shape), BATCH, 8).total < took() / 3


def test_parts_add_up() -> None:
    a, b = Seconds({"x": 1.0, "y": 2.0}), Seconds({"y": 3.0, "z": 0.5})
    assert (
        a + b == {"x": 1.0, "y": 5.0, "z": 0.5} and (a + b).total == a.total + b.total and (a * 2) == {"x": 2, "y": 4}
    )


def test_experts_cost_what_a_token_chooses(sizing: ModuleType) -> None:
    """And their exchange, twice e k T' H (ep - 1) / ep in either pass."""
    mixture = sizing.shape_of(sizing.MODELS["Qwen3-30B-A3B"])
    attention = 2 * (32 + 4) * 128 * 2048
    assert layer_flops(mixture, Layout(), 10.0) == 20 * (attention + 2048 * (128 + 3 * 8 * 768))
    machine = replace(IDEAL, link=1e9, network=1e9)
    passes = layer_seconds(model(mixture, machine, dp=8, ep=8), BATCH)
    assert [part["experts"] for part in passes] == pytest.approx([2 * 2 * 8 * BATCH.tokens * 2048 * 7 / 8 / 1e9] * 2)
    # One sequence reads eight of 128 experts for a token, many read all.
    one, many = (decode_seconds(model(mixture), n, 0.0)["weights"] for n in (1, 64))
    assert many == pytest.approx(2 * model_parameters(mixture) / H100.memory) and one < many / 8


def test_decoding_reads_weights_until_it_computes(shape: ModelShape) -> None:
    """Seconds of a token are bytes over the memory's rate, then FLOPs over that of products; caches grow with both."""
    floor = 2 * model_parameters(shape) / H100.memory
    assert decode_seconds(model(shape), 1, 0.0).total == pytest.approx(floor)
    assert decode_seconds(model(shape), 4096, 0.0)["weights"] > 5 * floor
    cache = decode_seconds(model(shape), 16, 1000.0)["keys and values"]
    assert cache == pytest.approx(16 * 1000 * 2 * 36 * 2 * 8 * 128 / H100.memory)
    assert decode_seconds(model(shape, tp=2), 16, 1000.0)["keys and values"] == pytest.approx(cache / 2)


def test_a_step_by_its_phases(sizing: ModuleType, shape: ModelShape) -> None:
    trainers = {
        "GRPO": (sizing.GRPO, {"sync", "gen", "update_actor"}),
        "reference": (sizing.REFERENCE, {"sync", "gen", "ref", "update_actor"}),
        "SDPO": (sizing.SDPO, {"sync", "gen", "update_actor"}),
        "GAD": (sizing.GAD, {"sync", "gen", "critic", "update_critic", "update_actor"}),
    }
    found = {}
    for name, (trainer, phases) in trainers.items():
        row = sizing.Row(name, trainer, 8, sizing.layout(4))
        case = sizing.planned(sizing.MODELS["Qwen3-8B"], row, "vllm")
        lengths = longest_step(case.config)
        found[name] = step_seconds(case, lengths, H100)
        assert found[name].keys() == phases
    assert found["SDPO"]["update_actor"]["teacher"] > 0 and found["reference"]["ref"].total > 0
    # A whole update on one rank's share, by hand: 256 micro-batches of two longest samples on each of two copies.
    case = sizing.planned(sizing.MODELS["Qwen3-8B"], sizing.Row("", sizing.GRPO, 8, sizing.layout(4)), "vllm")
    lengths = longest_step(case.config)
    cut = schedule(case.config, case.layout, lengths)
    assert (cut.micro_batches, len(lengths)) == (256, 1024)
    here = Model(shape=shape, layout=case.layout, machine=H100, width=2)
    assert found["GRPO"]["update_actor"] == update_seconds(here, BATCH, 256)
    assert stage_seconds(here, 0, BATCH)[1].total > 2 * stage_seconds(here, 0, BATCH)[0].total
    # Two engines of four ranks: 512 answers each, at once as many as 64 GiB of keys and values hold.
    at_once = 64 * 2**30 // (2 * 36 * 2 * 8 * 128 * 4096)
    engine = Model(shape=shape, layout=Layout(tp=4), machine=H100, width=2)
    drawn = decode_seconds(engine, at_once, 1024 + 1536) * (3072 * 512 / at_once)
    generated = generation_seconds(case, H100)
    assert at_once == 113 and {name: generated[name] for name in drawn} == pytest.approx(drawn)
    text = "\n".join(describe_step(case, lengths))
    assert "by a model" in text and "nothing was measured" in text and "on H200s" in text


def test_weights_to_the_engines(shape: ModelShape) -> None:
    size = 2 * model_parameters(shape)
    assert sync_seconds(model(shape)) == {"memory": pytest.approx(2 * size / H100.memory)}
    found = sync_seconds(model(shape, tp=4, pp=2))
    assert found["tensor parallel"] == pytest.approx(H100.gather(size, 4, 4))
    assert found["stage to stage"] == pytest.approx(H100.send(size / 4, 8))


def test_the_table_of_predictions_is_the_models(sizing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "size_cluster", sizing)
    spec = importlib.util.spec_from_file_location("predict_steps", ROOT / "tools" / "predict_steps.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (ROOT / "docs" / "performance.md").read_text()
    assert tool.written(page) == page and page.count("| Qwen3-8B | ") == 6
