"""Checkpoints: whole or not at all, refused where damaged, and the same state under any layout."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.types import RunError
from tests.dist.pool import Pool
from tests.dist.test_worker import make_worker, update
from tests.models import tiny_model

OPTIM: dict[str, Any] = {"lr": 1e-3, "eps": 1e-6, "warmup_steps": 3}
LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp1": (1, {}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2pp2": (4, {"tp": 2, "pp": 2}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True))


def store(directory: str, **options: Any) -> Any:
    from megatron_rl.checkpoint.store import CheckpointStore

    return CheckpointStore(directory, **{"keep": 9, **options})


def weights_of(worker: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in worker.named_hf_weights()}


def save_and_go_on(model: str, layout: dict, directory: str, load: str | None) -> tuple:
    """Two steps (or what `load` holds), a save, and one more step: its figures and weights."""
    worker = make_worker(model, layout, **OPTIM)
    if load:
        path = store(load).latest()
        state = store(load).load(path, {"actor": worker})
        assert (state["step"], state["note"], worker.version) == (2, [1, "two"], 2)
    else:
        update(worker), update(worker)
    store(directory).save(2, {"actor": worker}, {"note": [1, "two"]})
    return update(worker), weights_of(worker)


def check_resharding(pool: Pool, model: str, tmp_path: Path, names: list[str]) -> None:
    expected, weights = pool.run(save_and_go_on, 2, model, {"tp": 2}, str(tmp_path / "from"), None)[0]
    for name in names:
        world, layout = LAYOUTS[name]
        there, back = str(tmp_path / name), str(tmp_path / f"{name}_back")
        for target in (there, back):
            options = (world, model, layout, there, str(tmp_path / "from"))
            if target == back:
                options = (2, model, {"tp": 2}, back, there)
            for figures, found in pool.run(save_and_go_on, *options):
                # Of the same layout, bit by bit.
                exact = name == "tp2" or target == back
                assert figures[0] == (expected[0] if exact else pytest.approx(expected[0], abs=2e-6)), (name, target)
                for key, weight in weights.items():
                    assert (found[key] - weight).abs().max() <= (0 if exact else 2e-6), (name, key)


def test_state_goes_on_under_another_layout_and_comes_back(pool: Pool, model: str, tmp_path: Path) -> None:
    """TP2 to another layout and from there back to TP2: loss of the next step, and the weights after it."""
    check_resharding(pool, model, tmp_path, ["tp2", "dp2"])


@pytest.mark.full
def test_state_goes_on_under_every_layout(pool: Pool, model: str, tmp_path: Path) -> None:
    check_resharding(pool, model, tmp_path, ["tp1", "pp2", "tp2pp2"])


def save_one(model: str, directory: str) -> None:
    worker = make_worker(model, {"tp": 2}, **OPTIM)
    for step in (1, 2):
        update(worker)
        store(directory).save(step, {"actor": worker}, {})


def refusals(model: str, directory: str, damages: list[tuple[str, str]]) -> list[str]:
    """What `load` says of each damage, and that the checkpoint loads again once it is mended."""
    import torch.distributed as dist

    worker = make_worker(model, {"tp": 2}, **OPTIM)
    path, said = Path(directory) / "step_00000002", []
    for name, damage in damages:
        kept = (path / name).read_bytes()
        dist.barrier()
        if dist.get_rank() == 0:
            DAMAGES[damage](path / name)
        dist.barrier()
        try:
            store(directory).load(path, {"actor": worker})
            said.append("")
        except RunError as error:
            said.append(str(error))
        dist.barrier()
        if dist.get_rank() == 0:
            (path / name).write_bytes(kept)
        dist.barrier()
    store(directory).load(path, {"actor": worker})
    assert store(directory).load(path.with_name("step_00000001"), {"actor": worker})["step"] == 1
    return said


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "delete": lambda path: path.unlink(),
    "flip": _flip,
}


def test_every_damaged_file_is_refused_by_name(pool: Pool, model: str, tmp_path: Path) -> None:
    pool.run(save_one, 2, model, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "step_00000002\n" and not list(tmp_path.glob("*.partial"))
    path = tmp_path / "step_00000002"
    names = sorted(file.name for file in path.iterdir())
    assert names[:2] == [".metadata", "__0_0.distcp"] and {"common.pt", "manifest.json", "state.json"} < set(names)
    damages = [(name, damage) for name in names for damage in DAMAGES]
    for said in pool.run(refusals, 2, model, str(tmp_path), damages):
        for (name, damage), message in zip(damages, said, strict=True):
            assert str(path / name) in message, (name, damage, message)
            assert "To go back to step_00000001, write its name into" in message
    # Without reading the tensors, before any process is started, `latest` refuses what is missing or cut off.
    for name in names:
        shutil.move(path / name, tmp_path / "aside")
        with pytest.raises(RunError, match=f"{name}.*To go back to step_00000001"):
            store(str(tmp_path)).latest()
        shutil.move(tmp_path / "aside", path / name)
    for pointed in ("step_00000007", "..", "\0"):
        (tmp_path / "latest").write_text(pointed)
        with pytest.raises(RunError, match=r"latest names .* no such checkpoint"):
            store(str(tmp_path)).latest()
    (tmp_path / "latest").write_text("step_00000001")
    assert store(str(tmp_path)).latest() == tmp_path / "step_00000001"


class Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.target),))


def test_a_checkpoint_cannot_run_code(pool: Pool, model: str, tmp_path: Path) -> None:
    """Whoever can write a checkpoint can write its manifest too, so the pickle in it is read with care."""
    from megatron_rl.checkpoint.manifest import files_of, measure, write_manifest

    pool.run(save_one, 2, model, str(tmp_path / "run"))
    path = tmp_path / "run" / "step_00000002"
    (path / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    write_manifest(path, measure(path, files_of(path)))
    for said in pool.run(load_error, 2, model, str(path)):
        assert ".metadata is refused: it names posix.mkdir, which no checkpoint needs" in said
    torch.save({"actor": Attack(tmp_path / "owned")}, path / "common.pt")
    shutil.copy(path.with_name("step_00000001") / ".metadata", path / ".metadata")
    write_manifest(path, measure(path, files_of(path)))
    for said in pool.run(load_error, 2, model, str(path)):
        assert "weights_only" in said.lower() or "Weights only" in said
    assert not (tmp_path / "owned").exists()


def load_error(model: str, path: str) -> str:
    worker = make_worker(model, {"tp": 2}, **OPTIM)
    with pytest.raises(Exception) as caught:
        store(str(Path(path).parent)).load(Path(path), {"actor": worker})
    return str(caught.value)


def save_on_a_full_disk(model: str, directory: str) -> list[str]:
    """Limits the size of a file, as a full disk would, on one rank alone; then the checkpoints' own place is a file."""
    import resource

    import torch.distributed as dist

    from megatron_rl.checkpoint.writing import SaveError

    worker = make_worker(model, {"tp": 2}, **OPTIM)
    said = []
    store(directory).save(1, {"actor": worker}, {})
    for background in (False, True):
        saver = store(directory, background=background)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        with pytest.raises(SaveError) as caught:
            saver.save(2, {"actor": worker}, {})
            saver.complete()
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        said.append(str(caught.value))
    with pytest.raises(SaveError) as caught:
        store(f"{directory}/latest").save(2, {"actor": worker}, {})
    said.append(str(caught.value))
    path = store(directory).latest()
    assert store(directory).load(path, {"actor": worker})["step"] == 1
    return said


def test_a_failed_save_is_told_on_every_rank_and_costs_nothing(pool: Pool, model: str, tmp_path: Path) -> None:
    for full, later, nowhere in pool.run(save_on_a_full_disk, 2, model, str(tmp_path)):
        for said in (full, later):
            assert said.startswith(f"writing {tmp_path}/step_00000002.partial failed on rank 1: ")
            assert "File too large" in said and said.endswith("free space or correct the permissions there")
        assert "latest/step_00000002.partial failed on rank 0" in nowhere and "Not a directory" in nowhere
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def rates_of(model: str, directory: str, save: bool, optim: dict) -> tuple[list, list]:
    """Rates of two steps, and the betas, of a run that begins, or of one that goes on with other options."""
    from megatron_rl.config.optim import Schedule

    worker = make_worker(model, {"tp": 2}, schedule=Schedule.linear, **optim)
    if not save:
        store(directory).load(Path(directory) / "step_00000002", {"actor": worker})
    rates = [update(worker)[2] for _ in range(2)]
    if save:
        store(directory).save(2, {"actor": worker}, {})
    return rates, [group["betas"] for group in worker.optimizer.param_groups]


def test_options_are_the_configs_not_the_checkpoints(pool: Pool, model: str, tmp_path: Path) -> None:
    """From the rate to 0 in ten steps, counted from one."""
    for rates, betas in pool.run(rates_of, 2, model, str(tmp_path), True, {"lr": 1e-3}):
        assert rates == pytest.approx([9e-4, 8e-4]) and set(betas) == {(0.9, 0.999)}
    for rates, betas in pool.run(rates_of, 2, model, str(tmp_path), False, {"lr": 3e-3, "beta2": 0.9}):
        assert rates == pytest.approx([3e-3 * 0.7, 3e-3 * 0.6]) and set(betas) == {(0.9, 0.9)}


def save_in_background(model: str, directory: str) -> tuple[dict, dict, list[str | None]]:
    """Training goes on while a checkpoint is written; the weights at the save, those loaded, and `latest` meanwhile."""
    worker = make_worker(model, {"tp": 2}, **OPTIM)
    update(worker)
    saver = store(directory, background=True)
    saver.save(1, {"actor": worker}, {})
    saved = weights_of(worker)
    seen = [saver.latest()]
    update(worker)
    saver.poll()
    saver.save(2, {"actor": worker}, {})
    seen.append(saver.latest())
    saver.complete()
    seen.append(saver.latest())
    store(directory).load(Path(directory) / "step_00000001", {"actor": worker})
    return saved, weights_of(worker), [path and path.name for path in seen]


def test_a_save_in_the_background_holds_the_state_of_its_step(pool: Pool, model: str, tmp_path: Path) -> None:
    for saved, loaded, seen in pool.run(save_in_background, 2, model, str(tmp_path)):
        assert seen == [None, "step_00000001", "step_00000002"]
        for name, weight in saved.items():
            assert torch.equal(loaded[name], weight), name


def save_many(model: str, directory: str) -> None:
    worker = make_worker(model, {}, **OPTIM)
    (Path(directory) / "step_00000008.partial").mkdir(parents=True)
    saver = store(directory, keep=2, keep_every=3)
    for step in (40, *range(1, 9)):
        saver.save(step, {"actor": worker}, {})


def test_the_newest_and_every_third_are_kept(pool: Pool, model: str, tmp_path: Path) -> None:
    """And step 40, of a run in the same place that was given up."""
    pool.run(save_many, 1, model, str(tmp_path))
    names = sorted(path.name for path in tmp_path.glob("step_*"))
    assert names == [f"step_{step:08d}" for step in (3, 6, 7, 8, 40)]
    assert store(str(tmp_path)).latest() == tmp_path / "step_00000008"


def draw_around_a_save(model: str, directory: str) -> tuple[list, list, list]:
    """Draws of every generator after a save; the same after a load; the same in a process seeded otherwise."""
    import random

    import numpy as np

    from megatron_rl.parallel.generators import generator_states

    def draws() -> list:
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        with get_cuda_rng_tracker().fork():
            own = torch.rand(()).item()
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(), own]

    worker = make_worker(model, {"tp": 2}, **OPTIM)
    update(worker), random.gauss(0, 1), np.random.randn(), draws()
    assert {"python", "numpy", "torch", "megatron/model-parallel-rng"} <= set(generator_states())
    store(directory).save(1, {"actor": worker}, {})
    expected, other = draws(), draws()
    store(directory).load(Path(directory) / "step_00000001", {"actor": worker})
    return expected, draws(), other


def test_every_generator_of_every_rank_goes_on(pool: Pool, model: str, tmp_path: Path) -> None:
    (first, again, other), (second, second_again, _) = pool.run(draw_around_a_save, 2, model, str(tmp_path))
    assert first == again and second == second_again
    assert all(a != b for a, b in zip(first, other)) and first[-1] != second[-1]


class WithMore:
    """The worker as a role that has one tensor more."""

    def __init__(self, worker: Any) -> None:
        self.identity, self.load_state, self._state = worker.identity, worker.load_state, worker.sharded_state

    def sharded_state(self, *, loading: bool) -> dict[str, Any]:
        import torch.distributed as dist
        from megatron.core.dist_checkpointing import ShardedTensor

        more = ShardedTensor.from_rank_offsets("more.weight", torch.ones(3), replica_id=dist.get_rank())
        return {**self._state(loading=loading), "more": more}


def load_with_other_tensors(model: str, directory: str) -> list[str]:
    """What is said where the run lacks a tensor of the checkpoint, the checkpoint one of the run, or a whole role."""
    worker = make_worker(model, {"tp": 2}, **OPTIM)
    more, said = WithMore(worker), []
    path = Path(directory) / "step_00000001"
    for saved, loaded in (({"actor": more}, {"actor": worker}), ({"actor": worker}, {"actor": more})):
        store(directory).save(1, saved, {})
        with pytest.raises(RunError) as caught:
            store(directory).load(path, loaded)
        said.append(str(caught.value))
    with pytest.raises(RunError) as caught:
        store(directory).load(path, {"actor": worker, "reference": worker})
    said.append(str(caught.value))
    return said


def test_a_tensor_or_a_role_absent_on_either_side_is_named(pool: Pool, model: str, tmp_path: Path) -> None:
    for lacks, extra, roles in pool.run(load_with_other_tensors, 2, model, str(tmp_path)):
        for said in (lacks, extra):
            assert f"the checkpoint {tmp_path}/step_00000001 does not fit this run" in said
            assert "actor.more.weight" in said
        assert roles.endswith("step_00000001 holds actor, and this run actor, reference")


def test_another_run_is_refused_and_changes_are_listed(tmp_path: Path) -> None:
    from megatron_rl.checkpoint.manifest import files_of, measure, write_manifest
    from megatron_rl.config.load import load_config
    from megatron_rl.trainers.resume import checkpoint_to_continue, differences, latest_checkpoint, origin

    quickstart = Path(__file__).parents[2] / "examples" / "quickstart" / "grpo.yaml"

    def config(*overrides: str) -> Any:
        return load_config(quickstart, [f"run.dir={tmp_path}/run", *overrides])

    path = tmp_path / "run" / "checkpoints" / "step_00000005"
    path.mkdir(parents=True)
    state = {"step": 5, "models": {}, **origin(config())}
    (path / "state.json").write_text(json.dumps(state))
    write_manifest(path, measure(path, files_of(path)))
    (path.parent / "latest").write_text(path.name)

    free = ["parallel.tp=2", "checkpoint.every=3", "rollout.max_sequences=3", "eval.every=7", "log.histograms_every=1"]
    assert checkpoint_to_continue(config(*free)) == path
    assert "parallel.tp: 1 -> 2" in differences(path, config(*free))
    for changed in ("optim.lr=1", "algorithm.clip_low=0.1", "train.batch_size=32", "rollout.temperature=0.5"):
        key, _, value = changed.partition("=")
        with pytest.raises(ValueError, match=f"{key}: .* -> {value}.*run.allow_changes=true"):
            checkpoint_to_continue(config(changed))
        assert checkpoint_to_continue(config(changed, "run.allow_changes=true")) == path
        assert latest_checkpoint(config(changed)) == path  # as an evaluation asks
    # The learning rate's schedule depends on the number of steps, unless it is constant.
    with pytest.raises(ValueError, match=r"train\.steps"):
        checkpoint_to_continue(config("train.steps=99", "optim.schedule=linear"))
    constant = json.loads((path / "state.json").read_text())
    constant["config"]["optim"]["schedule"] = "constant"
    (path / "state.json").write_text(json.dumps(constant))
    write_manifest(path, measure(path, files_of(path)))
    assert checkpoint_to_continue(config("train.steps=99", "optim.schedule=constant")) == path
    # A checkpoint elsewhere, by its own path or its run's; one's own comes first; none is an error.
    elsewhere = "optim.schedule=constant", f"run.dir={tmp_path}/other"
    assert latest_checkpoint(config(*elsewhere)) is None
    assert latest_checkpoint(config(*elsewhere, f"checkpoint.load={path}")) == path
    assert latest_checkpoint(config(*elsewhere, f"checkpoint.load={tmp_path}/run")) == path
    with pytest.raises(ValueError, match=r"checkpoint\.load=.* is neither a checkpoint nor a run with checkpoints"):
        latest_checkpoint(config(*elsewhere, f"checkpoint.load={tmp_path}"))
    with pytest.raises(ValueError, match="is of trainer 'grpo', not 'sft'"):
        sft = load_config(quickstart.with_name("sft.yaml"), [f"run.dir={tmp_path}/run"])
        latest_checkpoint(sft)
