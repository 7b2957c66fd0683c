"""The moving average of weights: by hand, under every layout, in bfloat16, saved and resharded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_checkpoint import LAYOUTS, store, weights_of
from tests.dist.test_invariance import make_samples, objective
from tests.dist.test_worker import make_worker, update
from tests.models import tiny_model

OPTIM: dict[str, Any] = {"lr": 1e-2, "eps": 1e-4}
DECAYS = (0.9, 0.5, 0.0, 0.75)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True))


def empty_model(worker: Any, dtype: str = "float32") -> Any:
    from megatron_rl.config.schema import DType, ModelConfig
    from megatron_rl.workers.average import EmptyModel

    return EmptyModel(ModelConfig(path=str(worker.hf_path), dtype=DType(dtype)), worker.mesh)


def exported(average: Any, dtype: str = "float32") -> dict[str, Tensor]:
    written = empty_model(average.worker, dtype)
    average.write_to(written)
    assert written.version == average.num_updates
    return weights_of(written)


def tied_copies(average: Any) -> list[Tensor]:
    """The shards of the embedding and of its copy on the last stage, of this tensor-parallel rank."""
    from megatron_rl.models.exchange import named_parameters
    from megatron_rl.parallel.collect import gather_over_world

    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    mesh = average.worker.mesh
    mine = [
        (mesh.tp_rank, average.shards[parameter])
        for name, parameter in named_parameters(average.worker.models)
        if name in names and parameter in average.shards
    ]
    return [shard for rank, shard in gather_over_world(mine) if rank == mesh.tp_rank]


def follow(model: str, layout: dict, offload: bool) -> dict[str, Any]:
    """Four steps: the weights after each (the first are those before), the average, and what is said of it."""
    from megatron_rl.workers.average import WeightAverage

    worker = make_worker(model, layout, **OPTIM)
    average = WeightAverage(worker, DECAYS.__getitem__, offload=offload)
    history, used = [weights_of(worker)], []
    assert average.distance() == 0.0
    for _ in DECAYS:
        update(worker)
        used.append(average.update())
        history.append(weights_of(worker))
    found = {
        "history": history,
        "used": used,
        "average": exported(average),
        "distance": average.distance(),
        "tied": tied_copies(average),
        "bytes": average.state_bytes(),
        "elements": sum(parameter.numel() for chunk in worker.models for parameter in chunk.parameters()),
    }
    average.refresh()
    assert average.distance() == 0.0 and average.num_updates == 5
    return found | {"refreshed": exported(average)}


def averaged_by_hand(history: list[dict[str, Tensor]], decays: Any) -> dict[str, Tensor]:
    result = {name: weight.double() for name, weight in history[0].items()}
    for weights, decay in zip(history[1:], decays, strict=True):
        result = {name: decay * value + (1 - decay) * weights[name].double() for name, value in result.items()}
    return result


# What pp2 shows, tp2pp2 does.
@pytest.mark.parametrize(
    "layout", [pytest.param(x, marks=pytest.mark.full) if x in ("tp1", "tp2", "pp2") else x for x in LAYOUTS]
)
def test_the_average_is_the_one_by_hand(pool: Pool, model: str, layout: str) -> None:
    """And the tied embedding's two copies stay one; the distance is that of the exported weights; memory is 4 / dp."""
    world, options = LAYOUTS[layout]
    ranks = pool.run(follow, world, model, options, layout == "tp2")
    for found in ranks:
        expected = averaged_by_hand(found["history"], DECAYS)
        assert found["used"] == list(DECAYS) and expected.keys() == found["average"].keys()
        for name, value in expected.items():
            assert (found["average"][name] - value).abs().max() < 1e-6, name
            assert (found["history"][0][name] - value).abs().max() > 1e-3, name
            assert torch.equal(found["refreshed"][name], found["history"][-1][name]), name
        last = found["history"][-1]
        apart = sum(float((expected[name] - last[name]).square().sum()) for name in last)
        whole = sum(float(last[name].double().square().sum()) for name in last)
        assert found["distance"] == pytest.approx((apart / whole) ** 0.5, rel=1e-3)
        if "pp" in layout:
            assert torch.equal(*found["tied"])
    halves = world if layout == "dp2" else 1
    assert sum(found["bytes"] for found in ranks) * halves == 4 * sum(found["elements"] for found in ranks)


def follow_in_bfloat16(model: str, layout: dict) -> tuple[list[dict], list[dict], dict, dict]:
    """Weights, master weights, and the average in both precisions, over steps that bfloat16 cannot hold."""
    from megatron_rl.workers.average import WeightAverage

    worker = make_worker(model, layout, "bfloat16", lr=1e-5, eps=1e-4, weight_decay=0.0)
    seen = empty_model(worker, "bfloat16")
    average, masters = WeightAverage(worker, lambda _: 0.9, model=seen), WeightAverage(worker, lambda _: 0.0)
    history, wide = [weights_of(worker)], [exported(masters)]
    for _ in range(4):
        update(worker)
        average.update(), masters.update()
        assert seen.version == average.num_updates
        history.append(weights_of(worker))
        wide.append(exported(masters))
    narrow, at_once = exported(average, "bfloat16"), weights_of(seen)
    assert narrow.keys() == at_once.keys() and all(torch.equal(at_once[name], narrow[name]) for name in narrow)
    return history, wide, exported(average), narrow


@pytest.mark.parametrize("layout", [pytest.param("tp2pp2", marks=pytest.mark.full), "dp2"])
def test_in_bfloat16_it_moves_by_less_than_a_weight_can(pool: Pool, model: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    for history, wide, average, narrow in pool.run(follow_in_bfloat16, world, model, options):
        expected = averaged_by_hand(wide, [0.9] * 4)
        moved = elements = 0
        for name, value in average.items():
            assert (value - expected[name]).abs().max() < 5e-7, name
            assert torch.equal(narrow[name], value.bfloat16()) and narrow[name].dtype == torch.bfloat16, name
            for weights, masters in zip(history, wide, strict=True):
                assert torch.equal(weights[name], masters[name].bfloat16()), name
            # Half of what separates a bfloat16 of 2^-5 from the next smaller one is 6e-5: more than four steps of 1e-5.
            large = history[0][name].abs() >= 2**-5
            assert torch.equal(history[0][name][large], history[-1][name][large]), name
            moved += int((value != wide[0][name])[large].sum())
            elements += int(large.sum())
        assert moved > 0.5 * elements > 0, (moved, elements)


def follow_in_float32(model: str, layout: dict, offload: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """What a float32 model that follows an average has, an average alone, and how many shards are the model's own."""
    from megatron_rl.workers.average import WeightAverage

    worker = make_worker(model, layout, **OPTIM)
    seen = empty_model(worker, "float32")
    average, alone = (
        WeightAverage(worker, lambda _: 0.9, model=seen, offload=offload),
        WeightAverage(worker, lambda _: 0.9),
    )
    update(worker)
    assert average.update() == alone.update()
    own = {parameter.untyped_storage().data_ptr() for chunk in seen.models for parameter in chunk.parameters()}
    return (
        weights_of(seen),
        exported(alone),
        sum(x.untyped_storage().data_ptr() in own for x in average.shards.values()),
    )


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=pytest.mark.full)])
def test_in_float32_a_model_that_follows_is_the_average(pool: Pool, model: str, offload: bool) -> None:
    """On a CPU also one that is kept there: nothing else would be elsewhere."""
    world, options = LAYOUTS["dp2"]
    for seen, alone, own in pool.run(follow_in_float32, world, model, options, offload):
        assert own > 3 and seen.keys() == alone.keys()
        assert all(torch.equal(seen[name], alone[name]) for name in alone)


def freeze_and_follow(model: str) -> tuple[dict, dict]:
    """A model whose last norm is not trained but changed by hand, and so is a buffer; the weights and the average."""
    from megatron_rl.config.schema import ModelConfig, OptimConfig
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.average import WeightAverage
    from megatron_rl.workers.model_worker import ModelWorker

    class Frozen(ModelWorker):
        def _wrap(self, index: int, chunk: Any) -> Any:
            chunk.decoder.final_layernorm.requires_grad_(False)
            chunk.register_buffer("counter", torch.zeros(1))
            return super()._wrap(index, chunk)

    worker = Frozen(ModelConfig(path=model), OptimConfig(**OPTIM), create_mesh(), total_steps=10)
    average = WeightAverage(worker, lambda _: 0.9)
    update(worker)
    average.update()
    with torch.no_grad():
        worker.models[0].decoder.final_layernorm.weight.fill_(3.0)
        worker.models[0].counter.fill_(7.0)
    written = empty_model(worker)
    written.models[0].register_buffer("counter", torch.zeros(1))
    average.write_to(written)
    assert written.models[0].counter.item() == 7.0
    return weights_of(worker), weights_of(written)


def test_what_is_not_trained_is_copied(pool: Pool, model: str) -> None:
    weights, average = pool.run(freeze_and_follow, 1, model)[0]
    for name, value in average.items():
        assert torch.equal(value, weights[name]) == (name == "model.norm.weight"), name
    assert average["model.norm.weight"].unique().tolist() == [3.0]


def skip_between(model: str) -> tuple[list, dict, dict]:
    """Three steps, of which the second has a NaN among one rank's gradients."""
    import torch.distributed as dist

    from megatron_rl.trainers.average import take_step
    from megatron_rl.workers.average import WeightAverage

    worker = make_worker(model, {"tp": 2}, **OPTIM)
    average = WeightAverage(worker, lambda _: 0.5)
    samples = make_samples("token-mean")
    counts, weights = [], [weights_of(worker)]
    for poison in (False, True, False):
        worker.forward_backward(samples, worker.plan(samples, 48), objective("grpo"))
        if poison and dist.get_rank() == 1:
            worker.models[0].decoder.final_layernorm.weight.main_grad[3] = torch.nan
        counts.append((take_step(worker, average).applied, average.num_updates))
        weights.append(weights_of(worker))
    return counts, averaged_by_hand([weights[0], weights[1], weights[3]], [0.5, 0.5]), exported(average)


def test_a_skipped_step_is_no_update(pool: Pool, model: str) -> None:
    for counts, expected, found in pool.run(skip_between, 2, model):
        assert counts == [(True, 1), (False, 1), (True, 2)]
        for name, value in found.items():
            assert (value - expected[name]).abs().max() < 1e-6, name


def save_and_go_on(model: str, layout: dict, directory: str, load: str | None) -> tuple:
    """Four updates on the warm-up schedule (or what `load` holds), a save, two more; decays, averages at both."""
    from megatron_rl.config.average import AverageConfig, AverageSchedule
    from megatron_rl.workers.average import WeightAverage, decay_of

    worker = make_worker(model, layout, **OPTIM)
    average = WeightAverage(worker, decay_of(AverageConfig(schedule=AverageSchedule.warmup, power=0.75)))
    roles = {"actor": worker, "average": average}
    if load:
        store(load).load(store(load).latest(), roles)
        read = empty_model(worker, "bfloat16")
        read.load_checkpoint(store(load).latest(), "average")
        narrow, expected = weights_of(read), exported(average, "bfloat16")
        assert all(torch.equal(narrow[name], value) for name, value in expected.items())
    else:
        for _ in range(4):
            update(worker)
            average.update()
    assert average.num_updates == 4
    saved = exported(average)
    store(directory).save(4, roles, {})
    decays = []
    for _ in range(2):
        update(worker)
        decays.append(average.update())
    return decays, saved, exported(average), tied_copies(average)


@pytest.mark.parametrize(
    "layouts", [("tp2pp2",), pytest.param(("tp2", "dp2", "tp2pp2", "tp2"), marks=pytest.mark.full)]
)
def test_it_goes_on_bit_by_bit_and_under_other_layouts(
    pool: Pool, model: str, tmp_path: Path, layouts: tuple[str, ...]
) -> None:
    """From TP2, saved, to each in turn: the same average, also where it alone is read; the same schedule."""
    places = [str(tmp_path / str(place)) for place in range(5)]
    decays, saved, later, _ = pool.run(save_and_go_on, 2, model, {"tp": 2}, places[0], None)[0]
    assert decays == [1 - (1 + n) ** -0.75 for n in (3, 4)]
    for before, place, layout in zip(places, places[1:], layouts):
        world, options = LAYOUTS[layout]
        for found in pool.run(save_and_go_on, world, model, options, place, before):
            assert found[0] == decays
            for name, value in saved.items():
                assert torch.equal(found[1][name], value), (layout, name)
                gap = (found[2][name] - later[name]).abs().max()
                assert gap <= (0 if layout == "tp2" else 1e-4), (layout, name)
            if "pp" in layout:
                assert torch.equal(*found[3])
