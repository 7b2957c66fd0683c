"""What the report finds in a run, under our names and under verl's, and what it leaves alone."""

import json
import math
import random
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_rl.metrics.rules import RULES, TABLE, Action
from megatron_rl.report.findings import Severity, findings
from megatron_rl.report.series import our_names, read_run
from megatron_rl.report.verdict import Result, is_critic_run, verdict
from tests.event_files import NAME, warm_up, write_scalars
from tests.unit.test_rules import healthy

# Ours that verl calls otherwise.
VERL = {
    "actor/entropy": "actor/entropy_loss",
    "critic/student_value_mean": "critic/student_score_mean",
    "critic/teacher_value_mean": "critic/teacher_score_mean",
    "rollout_corr/rollout_is_mean": "mismatch/rollout_is_mean",
    "rollout_corr/k3_kl": "mismatch/mismatch_k3_kl",
    "reward/format": "critic/format_reward/mean",
    "val/accuracy": "val-core/gsm8k/acc/mean@1",
}
# What verl does not log at all.
OURS_ALONE = ("rollout/", "self_distillation/", "audit/", "sync/", "actor/skipped", "critic/score/std")
LAST, ONSET = 70, 50

Rows = dict[int, dict[str, float]]


def healthy_run() -> Rows:
    rows = {step: {k: v for k, v in row.items() if v is not None} for step, row in enumerate(healthy(LAST), 1)}
    for step in range(10, LAST + 1, 10):
        rows[step]["val/accuracy"] = 0.5 + step / 200
    return rows


def sick_run() -> Rows:
    """Everything at once. The format falls while the reward still rises; all else comes later."""
    rows = healthy_run()
    noise = random.Random(5)
    for step, row in rows.items():
        row["critic/ranking_loss"] = 0.5
        row["actor/loss"] = 0.1
        if step >= 22:
            row["reward/format"] = 0.6
        if step > 40:
            del row["critic/ranking_loss"]
        if step >= ONSET:
            row |= {
                "critic/d_acc": 0.95 if step > ONSET else 0.65,
                "critic/score_diff": 3.5,
                "reward/length_corr": -0.22,
                "critic/student_value_mean": max(-0.67, 1.03 - 0.2 * (step - ONSET)),
                "critic/teacher_value_std": 0.001,
                "critic/hard_sample_ratio": 0.01,
                "critic/identical_text_gap": 0.4 + noise.uniform(-0.01, 0.01),
                "critic/grad_norm": 39.0 if step == ONSET + 3 else row["critic/grad_norm"],
                "actor/grad_norm": 40.0 if step == ONSET + 4 else row["actor/grad_norm"],
                "critic/score/mean": 0.0,
                "rollout/correct": 0.0,
                "actor/entropy": 0.7,
                "rollout/commonest_response": 1.0,
                "response_length/min": 60.0,
                "rollout_corr/rollout_is_mean": 0.5,
                "rollout_corr/k3_kl": 0.1,
                "training/rollout_probs_diff_mean": 0.03,
                "actor/pg_clipfrac": 0.5,
                "actor/loss": math.nan,
            }
    del rows[30], rows[31]
    del rows[60]["actor/ppo_kl"]
    return rows


EVERYTHING = {
    *("d_acc_jump", "d_acc_saturated", "score_diff_high", "length_corr", "score_drift", "score_collapse"),
    *("hard_samples", "identical_text_gap", "critic_grad_spike", "grad_spike", "zero_reward", "reward_fall"),
    *("entropy_jump", "format_fall", "same_response", "constant_length", "is_drift", "stale_rollouts"),
    *("rollout_mismatch", "clip_fraction", "not_finite", "missing_steps", "holes", "early_end", "damaged_files"),
}
# Their figures are not in verl's logs.
NOT_VERLS = {"same_response", "reward_fall"}


def as_verl(rows: Rows) -> Rows:
    return {
        step: {VERL.get(name, name): value for name, value in row.items() if not name.startswith(OURS_ALONE)}
        for step, row in rows.items()
    }


def found_in(directory: Path) -> dict[str, list]:
    by_name: dict[str, list] = {}
    for finding in findings(read_run(directory)):
        by_name.setdefault(finding.name, []).append(finding)
    return by_name


@pytest.mark.parametrize("names", ["ours", "verl"])
def test_every_pathology_is_found(tmp_path: Path, names: str) -> None:
    rows = sick_run() if names == "ours" else as_verl(sick_run())
    path = write_scalars(tmp_path, rows.items())
    path.write_bytes(path.read_bytes()[:-5])  # the last value of the last step
    found = found_in(tmp_path)
    assert set(found) == (EVERYTHING if names == "ours" else EVERYTHING - NOT_VERLS)
    for name, of_one in found.items():
        for finding in of_one:
            assert finding.evidence and finding.cause and finding.remedy
            if name in RULES:
                severe = finding.severity is Severity.severe
                assert severe is RULES[name].is_severe and f"step {finding.step}:" in finding.evidence
    assert found["d_acc_jump"][0].step == ONSET + 1 and "is 0.95, above 0.85" in found["d_acc_jump"][0].evidence
    assert "is 39, above" in found["critic_grad_spike"][0].evidence
    assert found["missing_steps"][0].evidence == "nothing was logged between steps 29 to 32"
    assert "critic/ranking_loss at step 40" in found["early_end"][0].evidence
    assert "actor/ppo_kl at step 60" in found["holes"][0].evidence
    assert "actor/loss on 20 of 67 steps, first 50; not finite to the end" in found["not_finite"][0].evidence
    assert found["not_finite"][0].severity is Severity.severe
    order = [finding.severity for finding in findings(read_run(tmp_path))]
    assert order == sorted(order, key=lambda severity: severity is Severity.warning)


@pytest.mark.parametrize("names", ["ours", "verl"])
def test_a_healthy_run_has_no_findings(tmp_path: Path, names: str) -> None:
    rows = healthy_run() if names == "ours" else as_verl(healthy_run())
    write_scalars(tmp_path, rows.items())
    assert found_in(tmp_path) == {}
    run = read_run(tmp_path)
    assert run.curves["val/accuracy"].values.tolist() == pytest.approx([0.5 + step / 200 for step in range(10, 71, 10)])
    assert {row.result for row in verdict(run)} == {Result.passed}


def test_names_of_verl() -> None:
    theirs = ["actor/entropy", "actor/entropy_loss", "val-core/b/acc/mean@8", "val-core/a/acc/mean@8", "perf/mfu/actor"]
    assert our_names(theirs) == {name: name for name in theirs} | {"val-core/a/acc/mean@8": "val/accuracy"}
    assert our_names(["critic/rewards/mean"]) == {"critic/rewards/mean": "critic/score/mean"}
    assert our_names(["critic/rewards/mean", "critic/score/mean"])["critic/rewards/mean"] == "critic/rewards/mean"


def write_lines(directory: Path, rows: Mapping[int, Mapping[str, float | None]]) -> None:
    directory.mkdir(exist_ok=True)
    lines = (json.dumps({"step": step, "time": 1.0, **row}) + "\n" for step, row in rows.items())
    (directory / "metrics.jsonl").write_text("".join(lines))


def test_a_run_directory_of_ours(tmp_path: Path) -> None:
    """Lines count before event files; a torn line is told of; a null is a value that was not finite."""
    rows: dict[int, dict[str, float | None]] = {step: {"a": step / 2, "b": 1.0} for step in range(1, 10)}
    rows[5]["b"] = None
    write_lines(tmp_path, rows)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "a": 5')
    write_scalars(tmp_path / "tensorboard", ((step, {"a": 0.0, "c": 2.0}) for step in range(1, 10)))
    run = read_run(tmp_path)
    assert run.curves["a"].values.tolist() == [step / 2 for step in range(1, 10)]
    assert set(run.curves) == {"a", "b", "c"}
    found = found_in(tmp_path)
    assert set(found) == {"not_finite", "damaged_files"}
    (gap,) = found["not_finite"]
    assert (gap.severity, gap.evidence) == (Severity.warning, "b on 1 of 9 steps, first 5")
    assert found["damaged_files"][0].evidence.startswith("metrics.jsonl: 1 lines are cut off")


def test_the_options_and_alarms_of_the_run_count(tmp_path: Path) -> None:
    """Rules that were off or had another limit; a rule that stopped the run within a step, whose figures are lost."""
    rows = {step: {"response_length/clip_ratio": 0.95, "audit/pad_is_eos": 1.0} for step in range(1, 9)}
    write_lines(tmp_path, rows)
    assert set(found_in(tmp_path)) == {"truncated", "pad_is_eos"}
    (tmp_path / "config.yaml").write_text(
        "trainer: grpo\nguards: {ignore: [pad_is_eos], limits: {truncated: 0.96}}\nrollout: {parity_tolerance: 0.25}\n"
    )
    assert found_in(tmp_path) == {}
    alarm = {"step": 9, "rule": "parity", "figure": "rollout/log_prob_gap_max", "value": 0.5, "threshold": 0.25}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm | {"action": "stop", "message": "..."}) + "\n")
    (finding,) = found_in(tmp_path)["parity"]
    assert finding.severity is Severity.severe and finding.remedy == RULES["parity"].remedy
    assert "step 9: rollout/log_prob_gap_max is 0.5, its threshold 0.25" in finding.evidence


def test_samples_that_guards_kept_are_named(tmp_path: Path) -> None:
    write_lines(tmp_path, {step: {"actor/grad_norm": 50.0 if step == 15 else 1.0} for step in range(1, 19)})
    alarm = {"step": 15, "rule": "grad_spike", "figure": "actor/grad_norm", "samples": "samples_00000015.json"}
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    ((finding,),) = found_in(tmp_path).values()
    assert finding.evidence.endswith("samples of the step are in samples_00000015.json")


def test_a_rhythm_of_its_own_is_no_gap(tmp_path: Path) -> None:
    """Figures of every fifth step, of some steps only, of the first step; and a run that logs every tenth."""
    rows: Rows = {}
    for step in range(1, 31):
        rows[step] = {"a": 1.0}
        if step % 5 == 0:
            rows[step]["evaluated"] = 1.0
        if step % 3 != 1:
            rows[step]["sometimes"] = 1.0
    rows[1]["once"] = 1.0
    write_scalars(tmp_path / "own", rows.items())
    assert found_in(tmp_path / "own") == {}
    write_scalars(tmp_path / "sparse", ((10 * step, {"a": 1.0}) for step in range(9)))
    assert found_in(tmp_path / "sparse") == {}


def test_the_reviewed_warm_up_fails_in_the_right_rows(tmp_path: Path) -> None:
    write_scalars(tmp_path, warm_up().items())
    run = read_run(tmp_path)
    assert is_critic_run(run)
    gap, accuracy, length, student, hard = verdict(run)
    assert (gap.result, gap.number) == (Result.failed, "0.4 at most, at step 1")
    assert accuracy.result is Result.failed and accuracy.number.endswith("at step 10") and accuracy.number[:2] in "9495"
    assert length.result is Result.failed and length.number.startswith("-0.2")
    assert (student.result, student.number) == (Result.failed, "1.03 at step 1, -0.67 at step 10")
    assert (hard.result, hard.number) == (Result.failed, "0.5%, mean of steps 10 to 12")
    found = found_in(tmp_path)
    assert set(found) == {
        *("d_acc_jump", "d_acc_saturated", "length_corr", "critic_grad_spike", "score_drift", "hard_samples"),
        "identical_text_gap",
    }
    assert [found["d_acc_jump"][0].step, found["critic_grad_spike"][0].step] == [5, 8]


@pytest.mark.parametrize(
    ("row", "good"),
    [
        (0, {"critic/identical_text_gap": 0.02}),
        (1, {"critic/d_acc": 0.8}),
        (2, {"reward/length_corr": 0.1}),
        (3, {"critic/student_value_mean": 0.5}),
        (4, {"critic/hard_sample_ratio": 0.1}),
    ],
)
def test_each_row_of_the_verdict_is_of_its_own_figure(tmp_path: Path, row: int, good: dict[str, float]) -> None:
    rows = warm_up()
    write_scalars(tmp_path, ((step, figures | good) for step, figures in rows.items()))
    results = [Result.failed] * 5
    results[row] = Result.passed
    assert [one.result for one in verdict(read_run(tmp_path))] == results
    (name,) = good
    (tmp_path / NAME).unlink()
    write_scalars(tmp_path, ((s, {k: v for k, v in figures.items() if k != name}) for s, figures in rows.items()))
    results[row] = Result.unknown
    assert [one.result for one in verdict(read_run(tmp_path))] == results


def test_the_tenth_step_is_not_guessed(tmp_path: Path) -> None:
    """A run that ended before it has no answer; one that logs every fourth step is asked at the eighth."""
    write_scalars(tmp_path / "short", ((step, {"critic/d_acc": 0.7}) for step in range(1, 10)))
    assert verdict(read_run(tmp_path / "short"))[1].result is Result.unknown
    write_scalars(tmp_path / "rare", ((step, {"critic/d_acc": step / 100}) for step in range(80, 101, 4)))
    assert verdict(read_run(tmp_path / "rare"))[1].result is Result.unknown
    write_scalars(tmp_path / "fourth", ((step, {"critic/d_acc": step / 10}) for step in range(0, 21, 4)))
    assert verdict(read_run(tmp_path / "fourth"))[1].number == "80.0% at step 8"


def test_the_documentation_names_what_is_severe() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "report.md").read_text().split())
    named = re.search(r"Severe are the rules that stop a run, and (.*?)\. The others", page)
    assert named is not None
    severe = [rule.name for rule in TABLE if rule.is_severe and rule.action is not Action.stop]
    assert re.findall(r"`(\w+)`", named[1]) == severe
