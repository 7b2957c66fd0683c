"""Adversarial distillation, small: its phases, the same steps under every layout, and runs that go on."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool
from tests.loop.test_trainers import comparable, steps, train

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "gad"
CONFIG = str(EXAMPLE / "gad.yaml")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The example's task with its model before any training."""
    sys.path.insert(0, str(EXAMPLE))  # the task imports its reward
    sys.modules.pop("reward", None)
    spec = importlib.util.spec_from_file_location("gad_task", EXAMPLE / "task.py")
    assert spec is not None and spec.loader is not None
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    sys.path.remove(str(EXAMPLE))
    del sys.modules["reward"]
    place = tmp_path_factory.mktemp("gad")
    task.make_tokenizer(place / "base")
    task.make_model(place / "base", 1)
    task.make_data(place / "data", 1)
    return [
        f"model.path={place}/base",
        f"data.train={place}/data/train.jsonl",
        f"data.val={place}/data/heldout.jsonl",
        f"reward.name={EXAMPLE}/reward.py:habit",
        "train.steps=4",
        "train.batch_size=8",
        "rollout.group_size=2",
        "eval.every=2",
        "eval.limit=8",
        "eval.samples=0",
        "discriminator.sft_steps=1",
        "discriminator.warmup_steps=1",
        "checkpoint.every=1",
    ]


def run(pool: Pool, options: list[str], directory: Path, *more: str) -> list[dict[str, Any]]:
    pool.run(train, 2, str(ROOT), CONFIG, [*options, *more, f"run.dir={directory}"])
    return steps(directory)


def test_phases(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """Imitation, rest, and the game; the critic learns in all of them, from scores that were taken before."""
    rows = run(pool, options, tmp_path / "run", "parallel.tp=2", "discriminator.reward_weight=0.5")
    imitation, rest, *game = rows[1:]
    assert imitation["sft/nll"] > 0 and imitation["actor/grad_norm"] > 0 and "actor/pg_loss" not in imitation
    assert "actor/grad_norm" not in rest and "sft/nll" not in rest
    assert all(row["actor/grad_norm"] > 0 and "actor/pg_loss" in row for row in game)
    for row in rows[1:]:
        assert row["critic/grad_norm"] > 0 and row["critic/skipped"] == 0 and row["critic/lr"] > 0
        assert row["critic/score/mean"] == pytest.approx(row["reward/critic"] + 0.5 * row["reward/rule"])
        assert row["critic/teacher_length"] == 9 and abs(row["reward/length_corr"]) <= 1
    assert all("val/d_acc" in rows[step] for step in (0, 2, 4))
    # The held-out pairs are fixed, and the critic moves.
    assert len({rows[step]["val/score_diff"] for step in (0, 2, 4)}) == 3


def test_the_policy_rests_while_the_critic_warms_up(pool: Pool, options: list[str], tmp_path: Path) -> None:
    more = ["discriminator.sft_steps=0", "discriminator.warmup_steps=2", "train.steps=2", "parallel.pp=2"]
    rows = run(pool, options, tmp_path / "run", *more)
    start = dict(item.split("=", 1) for item in options)["model.path"]
    before, after = (load_file(f"{place}/model.safetensors") for place in (start, tmp_path / "run" / "hf"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert rows[1]["critic/d_loss"] != rows[2]["critic/d_loss"]


@pytest.mark.full
def test_layouts_take_the_same_steps(pool: Pool, options: list[str], tmp_path: Path) -> None:
    more = ["train.steps=2", "discriminator.sft_steps=0", "discriminator.warmup_steps=0"]
    more += ["train.mini_batches_per_step=2"]
    more += ["discriminator.batch_norm=true", "discriminator.debias_length=true", "kl.where=loss", "eval.every=0"]
    layouts = ("tp", "pp", "dp")
    found = {axis: run(pool, options, tmp_path / axis, *more, f"parallel.{axis}=2") for axis in layouts}
    for layout in ("pp", "dp"):
        for row, expected in zip(found[layout][1:], found["tp"][1:], strict=True):
            for name in ("critic/d_loss", "critic/grad_norm", "critic/student_value_mean", "actor/entropy"):
                assert row[name] == pytest.approx(expected[name], rel=1e-3), name
            assert row["response_length/mean"] == expected["response_length/mean"]


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("parallel.tp=2", ["kl.where=loss"]),
        pytest.param("parallel.pp=2", [], marks=pytest.mark.full),
        pytest.param("parallel.dp=2", ["train.mini_batches_per_step=2"], marks=pytest.mark.full),
    ],
)
def test_a_continued_run_is_the_uninterrupted_one(
    pool: Pool, options: list[str], tmp_path: Path, layout: str, more: list[str]
) -> None:
    """Critic, its moments, and the fixed pairs of the evaluation survive."""
    whole = run(pool, options, tmp_path / "whole", layout, *more)
    run(pool, options, tmp_path / "parts", layout, *more, "run.stop_after=2")
    parts = run(pool, options, tmp_path / "parts", layout, *more)
    for expected, found in zip(whole, parts, strict=True):
        assert comparable(found) == comparable(expected)
    a, b = ((tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert a == b


@pytest.mark.full
@pytest.mark.parametrize(("layout", "phase"), [("tp2", "backward"), ("pp2", "optimizer")])
def test_a_killed_run_goes_on_with_its_critic(options: list[str], tmp_path: Path, layout: str, phase: str) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import kill_matrix

    chosen = [*options, *kill_matrix.LAYOUTS[layout]]
    whole = tmp_path / "whole"
    assert kill_matrix.train(CONFIG, [*chosen, f"run.dir={whole}"], tmp_path / "log") == [0, 0]
    kill = kill_matrix.Kill(phase, 3, 0.0, "1")
    assert kill_matrix.attempt(CONFIG, chosen, kill, whole, tmp_path / "killed") == (2, True)


def test_held_out_rows_need_the_teachers_responses(options: list[str], tmp_path: Path) -> None:
    from megatron_rl.config.load import load_config
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.trainers.data import held_out_prompts

    (tmp_path / "val.jsonl").write_text('{"prompt": "abc="}\n')
    config = load_config(CONFIG, [*options, f"data.val={tmp_path}/val.jsonl"])
    with pytest.raises(ValueError, match=r"val.jsonl.* has no 'response'; its fields are \['prompt'\]"):
        held_out_prompts(config, load_tokenizer(config.model.path))
