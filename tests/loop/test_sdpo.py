"""Self-distillation, small: the teacher is there, moves and survives; nothing to learn from changes nothing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.dist.pool import Pool
from tests.loop.test_trainers import comparable, evaluate_run, steps, train

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "sdpo"
CONFIG = str(EXAMPLE / "sibling.yaml")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The example's task with its model before any training, which is now and then right by guessing one digit."""
    import importlib.util

    sys.path.insert(0, str(EXAMPLE))  # the task imports its reward
    spec = importlib.util.spec_from_file_location("sdpo_task", EXAMPLE / "task.py")
    assert spec is not None and spec.loader is not None
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    place = tmp_path_factory.mktemp("sdpo")
    task.make_tokenizer(place / "base")
    task.make_model(place / "base", 1)
    task.make_data(place / "data", 1)
    (place / "judge.py").write_text(JUDGE)
    return [
        f"model.path={place}/base",
        f"data.train={place}/data/train.jsonl",
        f"data.val={place}/data/heldout.jsonl",
        f"reward.name={place}/judge.py:judge",
        "reprompt.feedback=without_solution",
        "train.steps=4",
        "train.batch_size=8",
        "train.mini_batches_per_step=2",
        "rollout.group_size=4",
        "teacher.rate=0.3",
        "eval.every=0",
        "eval.limit=8",
    ]


JUDGE = '''
from megatron_rl.types import Reward

def judge(prompt, rollout, never=False):
    """A success for some, feedback for others, nothing for the rest."""
    kind = (prompt.index + sum(rollout.token_ids)) % 3
    if never or kind == 2:
        return Reward(value=0.0)
    return Reward(value=float(kind == 0), feedback="odd: wrong ones" if kind == 1 else None)
'''


def run(pool: Pool, options: list[str], directory: Path, *more: str) -> list[dict[str, Any]]:
    pool.run(train, 2, str(ROOT), CONFIG, [*options, *more, f"run.dir={directory}"])
    return steps(directory)


def test_the_teacher_moves_and_is_measured(pool: Pool, options: list[str], tmp_path: Path) -> None:
    rows = run(pool, options, tmp_path / "run", "parallel.tp=2", "teacher.every=step", "reprompt.feedback=always")
    for row in rows[1:]:
        assert 0 < row["self_distillation/target_fraction"] <= 1 and row["actor/skipped"] == 0
        assert row["self_distillation/empty_target_batch"] == 0 and row["actor/grad_norm"] > 0
        used, available = (row[f"self_distillation/feedback_{which}_fraction"] for which in ("used", "available"))
        assert 0 < used == available < 1
        assert 0 < row["self_distillation/success_sample_fraction"] < 1
        # The list of 100 of 102 ids holds almost everything.
        assert 0.97 < row["self_distillation/student_topk_mass"] <= 1 + 1e-6
        assert row["teacher/decay"] == pytest.approx(0.7)
        assert {"timing_s/reprompt", "self_distillation/agreement", "actor/entropy"} <= set(row)
    assert [row["teacher/updates"] for row in rows[1:]] == [2, 4, 6, 8]
    assert (tmp_path / "run" / "hf_average" / "model.safetensors").exists()
    pool.run(evaluate_run, 1, str(ROOT), CONFIG, [*options, f"run.dir={tmp_path}/run"])
    summary = json.loads((tmp_path / "run" / "eval" / "step_00000004-heldout" / "summary.json").read_text())
    report = summary["val"]["figures"] | summary["val_average"]["figures"]
    assert report == {name: rows[-1][name] for name in rows[-1] if name.startswith(("val/", "val_average/"))}
    assert report["val/accuracy"] != report["val_average/accuracy"]


def test_a_batch_without_targets_changes_nothing(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """No answer succeeds and none has feedback: neither weights, moments, schedule nor teacher move."""
    from safetensors.torch import load_file

    never = ["reward.options.never=true", "train.steps=2", "parallel.pp=2", "optim.weight_decay=0.1"]
    for row in run(pool, options, tmp_path / "run", *never)[1:]:
        assert row["self_distillation/empty_target_batch"] == 2 and row["self_distillation/target_fraction"] == 0
        assert "actor/grad_norm" not in row and "teacher/updates" not in row
    before = load_file(
        next(Path(o.partition("=")[2]) for o in options if o.startswith("model.path")) / "model.safetensors"
    )
    for name in ("hf", "hf_average"):
        after = load_file(tmp_path / "run" / name / "model.safetensors")
        assert all(torch.equal(after[key], value) for key, value in before.items() if key in after), name


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("parallel.tp=2", ["teacher.mode=trust_region", "distill.support=teacher"]),
        pytest.param(
            "parallel.pp=2",
            ["teacher.mode=frozen", "distill.loss=sampled_token", "distill.alpha=1"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            "parallel.dp=2",
            ["teacher.mode=live", "distill.support=full", "rollout_correction.level=token"],
            marks=pytest.mark.full,
        ),
        # The third batch comes after the checkpoint.
        pytest.param(
            "parallel.dp=2",
            ["teacher.mode=frozen", "teacher.refresh_every=3", "distill.weight=0.5"],
            marks=pytest.mark.full,
        ),
        pytest.param(
            "parallel.dp=2",
            ["teacher.schedule=warmup", "teacher.every=step", "reprompt.choice=random"],
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one(
    pool: Pool, options: list[str], tmp_path: Path, layout: str, more: list[str]
) -> None:
    """Every kind of teacher; each survives a checkpoint bit by bit."""
    whole = run(pool, options, tmp_path / "whole", layout, *more)
    run(pool, options, tmp_path / "parts", layout, *more, "run.stop_after=2")
    parts = run(pool, options, tmp_path / "parts", layout, *more)
    for expected, found in zip(whole, parts, strict=True):
        assert comparable(found) == comparable(expected)
    a, b = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b


@pytest.mark.full
def test_a_teacher_is_refreshed(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """Of the batches in which the actor moved every second; the average's own updates are the others."""
    more = ["parallel.dp=2", "teacher.refresh_every=2", "eval.every=2"]
    rows = run(pool, options, tmp_path / "ema", *more)[1:]
    assert [row["teacher/decay"] for row in rows] == pytest.approx([0.7, 0, 0.7, 0])
    assert [row["teacher/updates"] for row in rows] == [1, 2, 3, 4]
    a, b = ((tmp_path / "ema" / name / "model.safetensors").read_bytes() for name in ("hf", "hf_average"))
    assert a == b
    rows = run(pool, options, tmp_path / "frozen", *more, "teacher.mode=frozen")[1:]
    assert [row.get("teacher/decay") for row in rows] == [None, 0, None, 0]
    assert rows[-1]["teacher/updates"] == 2


def test_without_distillation_it_is_grpo(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """With the weight 0 every figure of the policy, and the weights after four updates, are those of GRPO's trainer."""
    from safetensors.torch import load_file

    shared = ["parallel.tp=2", "algorithm.name=gspo", "algorithm.entropy_coeff=0.01", "train.steps=2"]
    rows = run(pool, options, tmp_path / "sdpo", *shared, "distill.weight=0")
    text = Path(CONFIG).read_text().replace("trainer: sdpo", "trainer: grpo")
    sections = yaml.safe_load(text)
    for section in ("distill", "teacher", "reprompt"):
        sections.pop(section, None)
    config = tmp_path / "grpo.yaml"
    config.write_text(yaml.safe_dump(sections))
    own = [option for option in options if not option.startswith(("teacher.", "reprompt."))]
    pool.run(train, 2, str(ROOT), str(config), [*own, *shared, f"run.dir={tmp_path}/grpo"])
    for mine, theirs in zip(rows[1:], steps(tmp_path / "grpo")[1:], strict=True):
        expected = {name: value for name, value in comparable(theirs).items() if not name.startswith("sync/")}
        assert {"actor/pg_loss", "actor/grad_norm", "critic/advantages/max", "rollout/silent_groups"} <= set(expected)
        assert {name: mine[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True)
    a, b = (load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("sdpo", "grpo"))
    assert all((a[name] - value).abs().max() < 1e-6 for name, value in b.items())


def test_a_blend_learns_without_targets(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """Rewards differ, and none is a success: the policy loss moves the weights, the distillation has nothing to say."""
    more = ["parallel.pp=2", "reprompt.success_threshold=2", "reprompt.feedback=never", "train.steps=2"]
    for row in run(pool, options, tmp_path / "run", *more, "distill.weight=0.5")[1:]:
        assert row["self_distillation/empty_target_batch"] == 2 and row["self_distillation/target_fraction"] == 0
        assert row["actor/distill_loss"] == 0 and row["self_distillation/divergence"] is None
        assert row["actor/grad_norm"] > 0 and row["teacher/updates"] > 0


@pytest.mark.full
def test_success_decides_what_is_distilled(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """One step on the same rollouts: `failed` leaves out those that succeeded, `pass_rate` groups that tell nothing."""
    more = ["parallel.dp=2", "train.steps=1", "train.mini_batches_per_step=1", "distill.entropy_weighting=0.5"]
    rows = {
        kind: run(pool, options, tmp_path / kind, *more, f"distill.success_weighting={kind}")[1]
        for kind in ("none", "failed", "pass_rate")
    }
    share = {kind: row["self_distillation/target_fraction"] for kind, row in rows.items()}
    assert 0 < share["failed"] < share["none"] and 0 < share["pass_rate"] <= share["none"]
    assert len({row["actor/distill_loss"] for row in rows.values()}) == 3
    for row in rows.values():
        # Of a convex function of the teacher's entropy the mean is not below the function of the mean.
        least = math.exp(-0.5 * row["self_distillation/teacher_entropy"])
        assert least <= row["self_distillation/entropy_weight"] < 1


@pytest.mark.full
@pytest.mark.parametrize(("layout", "phase"), [("tp2", "backward"), ("pp2", "optimizer")])
def test_a_killed_run_goes_on_with_its_teacher(options: list[str], tmp_path: Path, layout: str, phase: str) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import kill_matrix

    chosen = [*options, *kill_matrix.LAYOUTS[layout], "checkpoint.every=2"]
    whole = tmp_path / "whole"
    assert kill_matrix.train(CONFIG, [*chosen, f"run.dir={whole}"], tmp_path / "log") == [0, 0]
    kill = kill_matrix.Kill(phase, 3, 0.0, "1")
    assert kill_matrix.attempt(CONFIG, chosen, kill, whole, tmp_path / "killed") == (2, True)
    a, b = ((path / "hf_average" / "model.safetensors").read_bytes() for path in (whole, tmp_path / "killed"))
    assert a == b
