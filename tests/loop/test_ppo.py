"""PPO, small: both models learn what they should, under every layout, stopped, killed and continued alike."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.dist.pool import Pool
from tests.loop.test_trainers import comparable, steps, train

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
CONFIG = str(QUICKSTART / "ppo.yaml")

JUDGE = '''
def taste(prompt, rollout, fails=0):
    """Likes some problems and half of all first tokens; with `fails` one of so many answers cannot be judged."""
    if fails and sum(rollout.token_ids) % fails == 0:
        return float("nan")
    return 0.5 * (prompt.token_ids[0] % 2) + 0.5 * (rollout.token_ids[0] % 2)
'''


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The quickstart's data, its model before any training, and a reward that such a model may earn."""
    sys.path.insert(0, str(QUICKSTART))
    import task

    place = tmp_path_factory.mktemp("ppo")
    task.make_tokenizer(place / "base")
    task.make_model(place / "base", 1)
    task.make_data(place / "data", 1)
    (place / "judge.py").write_text(JUDGE)
    return [
        f"model.path={place}/base",
        f"data.train={place}/data/train.jsonl",
        f"data.val={place}/data/heldout.jsonl",
        f"reward.name={place}/judge.py:taste",
        "train.steps=4",
        "train.batch_size=8",
        "train.mini_batches_per_step=2",
        "eval.every=0",
        "eval.limit=8",
    ]


def run(pool: Pool, options: list[str], directory: Path, *more: str) -> list[dict[str, Any]]:
    pool.run(train, 2, str(ROOT), CONFIG, [*options, *more, f"run.dir={directory}"])
    return steps(directory)


def base(options: list[str]) -> Path:
    return Path(options[0].partition("=")[2])


FIGURES = """
    critic/vf_loss critic/vf_clipfrac critic/vpred_mean critic/vf_explained_var critic/grad_norm
    critic/grad_norm_clipped critic/lr critic/skipped critic/returns/mean critic/returns/max critic/returns/min
    critic/values/mean critic/values/max critic/values/min critic/advantages/mean critic/advantages/max
    critic/advantages/min timing_s/values timing_s/update_critic
"""


def test_the_critic_learns_alone_at_first(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """While it does the actor stays bit by bit what it was, and the values come to explain the returns."""
    alone = ["train.steps=16", "train.batch_size=64", "ppo.critic_warmup=16", "critic.optim.lr=5e-3"]
    rows = run(pool, options, tmp_path / "run", "parallel.tp=2", *alone, "ppo.value_clip=null")[1:]
    before, after = (load_file(folder / "model.safetensors") for folder in (base(options), tmp_path / "run" / "hf"))
    assert all(torch.equal(after[name], before[name]) for name in after)
    for row in rows:
        assert set(FIGURES.split()) <= set(row) and "actor/lr" not in row and "rollout/silent_groups" not in row
        assert row["critic/skipped"] == row["critic/vf_clipfrac"] == 0
        assert row["critic/grad_norm_clipped"] == pytest.approx(min(row["critic/grad_norm"], 1.0))
        assert row["critic/advantages/mean"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["critic/vf_explained_var"] < 0.05
    assert min(row["critic/vf_explained_var"] for row in rows[-3:]) > 0.3
    assert rows[-1]["critic/vf_loss"] < 0.5 * rows[0]["critic/vf_loss"]
    config = json.loads((tmp_path / "run" / "hf_critic" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"] and config["id2label"] == {"0": "value"}


@pytest.mark.full
def test_the_exported_critic_is_a_classifier_and_a_critic_to_start_from(
    pool: Pool, options: list[str], tmp_path: Path
) -> None:
    """transformers reads one label of it; a second run that starts from it begins where the first one ended."""
    from transformers import AutoModelForSequenceClassification

    run(pool, options, tmp_path / "first", "parallel.tp=2", "train.steps=1", "critic.optim.lr=5e-3")
    critic = tmp_path / "first" / "hf_critic"
    classifier = AutoModelForSequenceClassification.from_pretrained(critic)
    assert classifier.num_labels == 1 and torch.equal(
        classifier.score.weight, load_file(critic / "model.safetensors")["score.weight"]
    )
    starts = [["critic.weights=" + str(tmp_path / "first")], [f"critic.path={critic}"]]
    found = [
        run(pool, options, tmp_path / str(number), "parallel.pp=2", "train.steps=1", *start)[1]["critic/values/mean"]
        for number, start in enumerate([[], *starts])
    ]
    assert found[1] == pytest.approx(found[2], rel=1e-5) and abs(found[1] - found[0]) > 1e-2


@pytest.mark.full
def test_layouts_take_the_same_steps(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """To rounding, both models' first updates; group by group or answer by answer makes no difference to that."""
    found = {}
    for layout in ("tp", "pp", "dp"):
        more = [f"parallel.{layout}=2", "train.steps=2", "train.epochs_per_step=2", "kl.where=reward", "ppo.lam=0.9"]
        found[layout] = run(pool, options, tmp_path / layout, *more, "rollout.group_size=2")[1:]
    for layout in ("pp", "dp"):
        for row, expected in zip(found[layout], found["tp"], strict=True):
            assert row["critic/score/mean"] == expected["critic/score/mean"]
            for name in ("actor/grad_norm", "critic/grad_norm", "critic/vf_loss", "critic/vf_explained_var"):
                assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), (layout, name)
    assert found["tp"][1]["actor/reward_kl_penalty"] > 0


def test_what_cannot_be_judged_teaches_neither(pool: Pool, options: list[str], tmp_path: Path) -> None:
    """Half of the answers do not enter the figures; where none is judged, both models stay bit by bit as they were."""
    some, none = (
        run(pool, options, tmp_path / name, "parallel.dp=2", f"reward.options.fails={fails}", "train.steps=1")[1]
        for name, fails in (("some", 2), ("none", 1))
    )
    assert 0 < some["reward/failed"] < 8 == none["reward/failed"]
    assert 0 <= some["critic/returns/min"] <= some["critic/returns/max"] <= 1 and some["critic/grad_norm"] > 0
    assert none["critic/vf_loss"] == none["critic/grad_norm"] == none["actor/grad_norm"] == 0
    assert "critic/returns/mean" not in none and none["critic/skipped"] == none["actor/skipped"] == 0
    first, actor, critic = (
        load_file(folder / "model.safetensors")
        for folder in (base(options), tmp_path / "none" / "hf", tmp_path / "none" / "hf_critic")
    )
    assert all(torch.equal(actor[name], first[name]) for name in actor)
    assert all(torch.equal(critic[name], first[name]) for name in critic if name != "score.weight")


CASES = [
    ("parallel.tp=2", ["ppo.critic_warmup=1", "average.enabled=true"]),
    pytest.param("parallel.pp=2", ["kl.where=reward", "train.epochs_per_step=2"], marks=pytest.mark.full),
    pytest.param("parallel.dp=2", ["kl.where=loss", "ema.axis=token"], marks=pytest.mark.full),
]


@pytest.mark.parametrize(("layout", "more"), CASES)
def test_a_continued_run_is_the_uninterrupted_one(
    pool: Pool, options: list[str], tmp_path: Path, layout: str, more: list[str]
) -> None:
    whole = run(pool, options, tmp_path / "whole", layout, *more)
    run(pool, options, tmp_path / "parts", layout, *more, "run.stop_after=2")
    parts = run(pool, options, tmp_path / "parts", layout, *more)
    for expected, found in zip(whole, parts, strict=True):
        assert comparable(found) == comparable(expected)
    for name in ("hf", "hf_critic"):
        a, b = ((tmp_path / place / name / "model.safetensors").read_bytes() for place in ("whole", "parts"))
        assert a == b, name


@pytest.mark.full
@pytest.mark.parametrize(("layout", "phase"), [("tp2", "backward"), ("pp2", "optimizer"), ("dp2", "rename")])
def test_a_killed_run_goes_on_with_its_critic(options: list[str], tmp_path: Path, layout: str, phase: str) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import kill_matrix

    chosen = [*options, *kill_matrix.LAYOUTS[layout], "checkpoint.every=2"]
    whole = tmp_path / "whole"
    assert kill_matrix.train(CONFIG, [*chosen, f"run.dir={whole}"], tmp_path / "log") == [0, 0]
    kill = kill_matrix.Kill(phase, 4 if phase == "rename" else 3, 0.0, "0")
    assert kill_matrix.attempt(CONFIG, chosen, kill, whole, tmp_path / "killed") == (2, True)
    a, b = ((path / "hf_critic" / "model.safetensors").read_bytes() for path in (whole, tmp_path / "killed"))
    assert a == b
