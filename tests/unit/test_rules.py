"""The table of rules and its monitor: what fires, when, and that healthy runs are left alone."""

import csv
import json
import math
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.load import options_of
from megatron_rl.config.schema import ExpertIterationConfig, GrpoConfig, SdpoConfig
from megatron_rl.metrics.rules import RULES, TABLE, Action, chosen_rules
from megatron_rl.metrics.watch import Alarm, Watch

ROOT = Path(__file__).parents[2]
ONSET, LAST = 40, 60
Row = dict[str, float | None]


def healthy(last: int = 100) -> list[Row]:
    """A run like the quickstart's: it goes from half the answers right to nearly all, and its entropy to a third."""
    noise = random.Random(1)
    rows: list[Row] = []
    for step in range(1, last + 1):
        right = 0.97 - 0.5 * math.exp(-step / 25) + noise.uniform(-0.02, 0.02)
        entropy = 0.045 + 0.1 * math.exp(-step / 40) + noise.uniform(-0.01, 0.01)
        rows.append(
            {
                "critic/score/mean": right,
                "critic/score/std": math.sqrt(right * (1 - right)),
                "critic/score/max": 1.0,
                "rollout/correct": right,
                "rollout/silent_groups": 0.9 * right**2,
                "rollout/entropy": entropy,
                "rollout/commonest_response": noise.uniform(0.01, 0.04),
                "rollout/log_prob_gap_max": noise.uniform(1e-6, 1e-5),
                "response_length/mean": 40 * noise.uniform(0.9, 1.1) * (1 + step / 100),
                "response_length/clip_ratio": noise.uniform(0, 0.1),
                "actor/entropy": entropy * noise.uniform(0.9, 1.1),
                "actor/grad_norm": math.exp(noise.gauss(-0.7, 0.4)),
                "actor/skipped": 0.0,
                "actor/kl_loss": noise.uniform(0, 1e-3),
                "actor/reward_kl_penalty": noise.uniform(0, 1e-3),
                "actor/ppo_kl": noise.uniform(-1e-3, 1e-3),
                "sync/wrong_tensors": 0.0,
                "audit/finish_mismatch": 0.0,
                "audit/pad_is_eos": 0.0,
                "audit/prompt_loss": 0.0,
                "audit/token_mismatch": 0.0,
                "self_distillation/target_fraction": 0.2 + 0.8 * right,
                "self_distillation/sampled_token_distance": entropy * noise.uniform(0.5, 1.5),
                "self_distillation/sampled_token_gap": -entropy * noise.uniform(0.2, 1),
                "self_distillation/student_topk_mass": 1 - 0.1 * entropy * noise.uniform(0, 1),
                "reward/format": 1 - 0.1 * math.exp(-step / 10) - noise.uniform(0, 0.01),
                "response_length/min": 20.0,
                "response_length/max": 60.0,
                "rollout_corr/rollout_is_mean": noise.uniform(0.95, 1.0),
                "rollout_corr/k3_kl": noise.uniform(0, 1e-3),
                "training/rollout_probs_diff_mean": noise.uniform(2e-3, 4e-3),
                "actor/pg_clipfrac": noise.uniform(0, 0.05),
                "expert/kept": round(1000 * right),
                **critic(step, noise),
            }
        )
    return rows


def critic(step: int, noise: random.Random) -> Row:
    """A critic that learns in ten steps to be right on three pairs of four."""
    learned = 1 - math.exp(-step / 5)
    return {
        "critic/d_acc": 0.52 + 0.24 * learned + noise.uniform(-0.02, 0.02),
        "critic/score_diff": 1.8 * learned + noise.uniform(-0.1, 0.1),
        "critic/teacher_value_mean": 1.0 + 1.2 * learned + noise.uniform(-0.05, 0.05),
        "critic/student_value_mean": 1.0 - 0.6 * learned + noise.uniform(-0.05, 0.05),
        "critic/teacher_value_std": noise.uniform(0.8, 1.2),
        "critic/student_value_std": noise.uniform(0.8, 1.2),
        "critic/hard_sample_ratio": noise.uniform(0.08, 0.14),
        "critic/identical_text_gap": noise.uniform(0, 0.01),
        "critic/grad_norm": 3 * math.exp(noise.gauss(0, 0.3)),
        "reward/length_corr": noise.uniform(-0.08, 0.08),
    }


def findings(rows: list[Row], watch: Watch | None = None) -> list[Alarm]:
    watch = watch or Watch(TABLE)
    return [alarm for step, row in enumerate(rows, start=1) for alarm in watch(step, row)]


def fault(rule: str) -> tuple[dict[str, float], dict[str, int]]:
    """Figures from the step ONSET on, and the first alarm of every rule that they set off."""
    third = ONSET + 2
    unsolved = {"rollout/correct": 0.5}
    return {
        "parity": ({"rollout/log_prob_gap_max": 2e-3}, {"parity": ONSET}),
        "weight_checksum": ({"sync/wrong_tensors": 1.0}, {"weight_checksum": ONSET}),
        "finish_mismatch": ({"audit/finish_mismatch": 3.0}, {"finish_mismatch": ONSET}),
        "pad_is_eos": ({"audit/pad_is_eos": 1.0}, {"pad_is_eos": ONSET}),
        "prompt_loss": ({"audit/prompt_loss": 1.0}, {"prompt_loss": ONSET}),
        "token_mismatch": ({"audit/token_mismatch": 1.0}, {"token_mismatch": ONSET}),
        "truncated": ({"response_length/clip_ratio": 0.95}, {"truncated": third}),
        "skipped_update": ({"actor/skipped": 1.0}, {"skipped_update": ONSET, "skipped_in_a_row": third}),
        "skipped_in_a_row": ({"actor/skipped": 2.0}, {"skipped_update": ONSET, "skipped_in_a_row": third}),
        "grad_spike": ({"actor/grad_norm": 12.0}, {"grad_spike": ONSET}),
        "silent_groups": ({"rollout/silent_groups": 0.96} | unsolved, {"silent_groups": third}),
        "negative_kl": ({"actor/kl_loss": -2e-4}, {"negative_kl": ONSET}),
        "negative_ppo_kl": ({"actor/ppo_kl": -0.2}, {"negative_ppo_kl": ONSET}),
        "entropy_explosion": ({"actor/entropy": 1.1}, {"entropy_jump": ONSET, "entropy_explosion": ONSET + 1}),
        "entropy_high": (
            {"actor/entropy": 7.0},
            {"entropy_jump": ONSET, "entropy_high": ONSET + 1, "entropy_explosion": ONSET + 1},
        ),
        "entropy_collapse": ({"actor/entropy": 0.01} | unsolved, {"entropy_collapse": third}),
        "entropy_low": ({"rollout/entropy": 4e-3} | unsolved, {"entropy_low": third, "entropy_collapse": third}),
        # 0.88 before: six of the last ten at 0.4 are the first to pull the mean half of the largest deviation down.
        "reward_fall": ({"critic/score/mean": 0.4} | unsolved, {"reward_fall": ONSET + 5}),
        "constant_reward": ({"critic/score/std": 0.0} | unsolved, {"constant_reward": third}),
        "same_response": ({"rollout/commonest_response": 0.95}, {"same_response": third}),
        "length_runaway": ({"response_length/mean": 130.0}, {"length_runaway": third}),
        "no_targets": ({"self_distillation/target_fraction": 0.04} | unsolved, {"no_targets": third}),
        "teacher_is_student": (
            {"self_distillation/sampled_token_distance": 5e-4} | unsolved,
            {"teacher_is_student": third},
        ),
        "teacher_is_lost": ({"self_distillation/sampled_token_gap": -3.5}, {"teacher_is_lost": third}),
        "topk_mass_low": (
            {"self_distillation/student_topk_mass": 0.7},
            {"topk_mass_low": third, "topk_mass_fall": third},
        ),
        "topk_mass_fall": ({"self_distillation/student_topk_mass": 0.9}, {"topk_mass_fall": third}),
        # The fifth of a row of zeros is the first whose mean is below 5% of 0.87.
        "zero_reward": ({"critic/score/mean": 0.0} | unsolved, {"reward_fall": ONSET + 3, "zero_reward": ONSET + 4}),
        "nothing_kept": ({"expert/kept": 0.0}, {"nothing_kept": third}),
        "entropy_jump": ({"actor/entropy": 0.6}, {"entropy_jump": ONSET}),
        # Three of the last ten at 0.5 are the first to pull the mean a tenth down; the reward has grown to then.
        "format_fall": ({"reward/format": 0.5}, {"format_fall": third}),
        # The largest reward is 1, and the mean 0.88: all right answers, or another way to the reward.
        "unearned_reward": ({"rollout/correct": 0.01}, {"unearned_reward": ONSET + 4}),
        "constant_length": ({"response_length/min": 60.0} | unsolved, {"constant_length": ONSET + 4}),
        "is_drift": ({"rollout_corr/rollout_is_mean": 0.6}, {"is_drift": third}),
        "clip_fraction": ({"actor/pg_clipfrac": 0.4}, {"clip_fraction": ONSET + 9}),
        "ppo_kl_high": ({"actor/ppo_kl": 0.3}, {"ppo_kl_high": third}),
        "stale_rollouts": ({"rollout_corr/k3_kl": 0.06}, {"stale_rollouts": third}),
        "rollout_mismatch": ({"training/rollout_probs_diff_mean": 0.02}, {"rollout_mismatch": third}),
        "d_acc_jump": ({"critic/d_acc": 0.99}, {"d_acc_jump": ONSET, "d_acc_saturated": third}),
        "d_acc_saturated": ({"critic/d_acc": 0.9}, {"d_acc_saturated": third}),
        "d_acc_low": ({"critic/d_acc": 0.6}, {"d_acc_low": ONSET + 19}),
        "score_diff_high": ({"critic/score_diff": 3.2}, {"score_diff_high": third}),
        "score_diff_low": ({"critic/score_diff": 0.8}, {"score_diff_low": ONSET + 19}),
        "length_corr": ({"reward/length_corr": -0.22}, {"length_corr": third}),
        "critic_grad_spike": ({"critic/grad_norm": 39.0}, {"critic_grad_spike": ONSET}),
        "score_drift": ({"critic/student_value_mean": -0.7}, {"score_drift": ONSET}),
        "score_collapse": ({"critic/teacher_value_std": 1e-3}, {"score_collapse": third}),
        "hard_samples": ({"critic/hard_sample_ratio": 0.01}, {"hard_samples": third}),
        "identical_text_gap": ({"critic/identical_text_gap": 0.4}, {"identical_text_gap": ONSET}),
    }[rule]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_fires_on_its_fault_and_no_other_does(rule: str) -> None:
    figures, expected = fault(rule)
    rows = [row | figures if step >= ONSET else row for step, row in enumerate(healthy(LAST), start=1)]
    first: dict[str, int] = {}
    for alarm in findings(rows):
        first.setdefault(alarm.rule.name, alarm.step)
        assert f"step {alarm.step}: {alarm.rule.name}: " in alarm.message and alarm.rule.remedy in alarm.message
    assert first == expected


def test_healthy_runs_raise_nothing() -> None:
    assert findings(healthy()) == []
    assert findings([row | {"rollout/correct": None} for row in healthy()]) == []


@pytest.mark.parametrize("sweep", ["ema", "layouts"])
def test_measured_curves_raise_nothing(sweep: str) -> None:
    """Rewards of real runs; one of zero or one has the deviation sqrt(p (1 - p))."""
    runs: dict[tuple, list[Row]] = defaultdict(list)
    with (ROOT / "docs" / "results" / sweep / "curves.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["reward"]:
                p = float(row["reward"])
                figures: Row = {
                    "critic/score/mean": p,
                    "rollout/correct": p,
                    "critic/score/std": math.sqrt(p * (1 - p)),
                }
                runs[row["case"], row["seed"]].append(figures)
    assert len(runs) > 2 and all(len(rows) >= 30 for rows in runs.values())
    for rows in runs.values():
        assert findings(rows) == []
        if sweep == "layouts":  # a hundred steps, of which the first lie far below the last: backwards they are a fall
            assert {alarm.rule.name for alarm in findings(rows[::-1])} == {"reward_fall"}


def test_thresholds() -> None:
    """Medians, starts and best means by hand."""
    watch = Watch([RULES["grad_spike"], RULES["entropy_explosion"], RULES["reward_fall"]])
    norms = [1.0, 3.0, 2.0, 5.0, 4.0, 1.0, 2.0, 3.0, 9.0]
    assert [watch(s, {"actor/grad_norm": n}) for s, n in enumerate(norms, 1)] == [[]] * 9
    assert watch(10, {"actor/grad_norm": 31.0}) == []  # nine norms are too few to judge the tenth
    (alarm,) = watch(11, {"actor/grad_norm": 31.0})
    assert (alarm.value, alarm.threshold) == (31.0, 10 * 3.0)  # of 1 1 2 2 3 3 4 5 9 31
    for step, entropy in enumerate([0.5, 0.7, 0.6, 0.9, 0.8, 2.2, 2.2], 1):
        alarms = watch(step, {"actor/entropy": entropy})
    assert [(alarm.value, alarm.threshold) for alarm in alarms] == [(2.2, pytest.approx(3 * 0.7))]
    for step in range(1, 17):
        alarms = watch(step, {"critic/score/mean": 0.8 if step <= 10 else 0.31, "critic/score/std": 0.4})
        if step == 14:
            assert alarms == []  # a mean of 0.604 is not below 0.8 - 0.5 x 0.4
        if step == 15:
            assert [(a.value, a.threshold) for a in alarms] == [(pytest.approx(0.555), pytest.approx(0.6))]


def judged(rule: str, figure: str, values: list[float], **others: list[float]) -> list[tuple[int, float, float]]:
    """(step, value, threshold) of a rule's alarms over values from step 1 on; `others` are figures beside it."""
    watch = Watch([RULES[rule]])
    found = []
    for place, value in enumerate(values):
        row = {figure: value} | {name.replace("__", "/"): series[place] for name, series in others.items()}
        found += [(a.step, pytest.approx(a.value), pytest.approx(a.threshold)) for a in watch(place + 1, row)]
    return found


def test_thresholds_of_jumps_distances_and_means() -> None:
    """By hand, on both sides of each limit."""
    assert judged("d_acc_jump", "critic/d_acc", [0.95, 0.5, 0.69, 0.95, 0.95]) == [(4, 0.95, 0.89)]
    assert judged("length_corr", "reward/length_corr", [-0.14, 0.14, 0.1] * 2 + [-0.22, 0.2, -0.16]) == [
        (9, -0.16, -0.15)
    ]
    assert judged("is_drift", "rollout_corr/rollout_is_mean", [0.71] * 4 + [1.31] * 3) == [(7, 1.31, 1.3)]
    assert judged("score_drift", "critic/student_value_mean", [1.03, -0.4, -0.67]) == [(3, -0.67, 1.03 - 1.5)]
    assert judged("score_drift", "critic/teacher_value_mean", [1.03, 2.5, 2.6]) == [(3, 2.6, 2.53)]
    # Five means of zero are no fall from a best of 0.09, and a mean far below zero is no reward of zero.
    assert judged("zero_reward", "critic/score/mean", [0.09] * 5 + [0.0] * 9) == []
    assert judged("zero_reward", "critic/score/mean", [1.0] * 5 + [-5.0] * 9) == []
    assert judged("zero_reward", "critic/score/mean", [1.0] * 5 + [0.2, 0.0, 0.0, 0.0, 0.0]) == [(10, 0.04, 0.05)]
    # The first update destroys the policy: no mean of five is good, but that of the first value alone is.
    assert judged("zero_reward", "critic/score/mean", [0.4] + [0.0] * 9) == [(6, 0.0, 0.02)]
    assert judged("zero_reward", "critic/score/mean", [0.4] + [0.03] * 9) == []
    assert judged("zero_reward", "critic/score/mean", [0.09] + [0.0] * 9) == []
    assert judged("ppo_kl_high", "actor/ppo_kl", [0.3, 0.3, 0.09, 0.2, 0.2, 0.11]) == [(6, 0.11, 0.1)]
    forms, rising, still = [1.0] * 10 + [0.88] * 10, [0.1] * 10 + [0.2] * 10, [0.1] * 20
    assert judged("format_fall", "reward/format", forms, critic__score__mean=rising) == [(20, 0.88, 0.9)]
    assert judged("format_fall", "reward/format", forms, critic__score__mean=still) == []
    right, most, least = [0.3, 0.1, 0.0, 0.0, 0.0, 0.1], [2.0] + [1.8] * 5, [-1.0] * 6
    assert judged(
        "unearned_reward", "critic/score/mean", [1.7] * 6, rollout__correct=right, critic__score__max=most
    ) == [(6, 1.7, 1.6)]
    assert not judged("unearned_reward", "critic/score/mean", [1.7] * 6, critic__score__max=most)
    for score, best in (([1.4] * 6, most), ([-1.2] * 6, least)):
        assert not judged(
            "unearned_reward", "critic/score/mean", score, rollout__correct=right, critic__score__max=best
        )
    long, short = [9.0] * 12, [9.0] * 3 + [8.0] + [9.0] * 8
    assert judged("constant_length", "response_length/min", short, response_length__max=long) == [(9, 0.0, 0.5)]
    (alarm,) = Watch([RULES["identical_text_gap"]])(7, {"critic/identical_text_gap": 0.4})
    assert alarm.message.startswith("step 7: identical_text_gap: critic/identical_text_gap is 0.4, above 0.1. Likely")


def test_an_alarm_comes_once_until_it_has_recovered() -> None:
    watch = Watch([RULES["truncated"]])
    ratios = [1, 1, 1, 1, 1, 0, 1, 1, 0.9, 1, 1, 1, 1]
    assert [a.step for s, r in enumerate(ratios, 1) for a in watch(s, {"response_length/clip_ratio": r})] == [3, 12]


def test_what_is_not_there_or_not_a_number_is_passed_over() -> None:
    """A file has null where a run had NaN; a step without the figure neither adds to a row of them nor ends it."""
    for nothing in ({}, {"actor/skipped": None}, {"actor/skipped": math.nan}, {"actor/skipped": math.inf}):
        watch = Watch([RULES["skipped_in_a_row"]])
        rows: list[Any] = [{"actor/skipped": 1.0}, nothing, {"actor/skipped": 1.0}, {"actor/skipped": 1.0}]
        assert [alarm.step for alarm in findings(rows, watch)] == [4]


@pytest.mark.parametrize(
    "rule",
    [
        *("grad_spike", "entropy_low", "reward_fall", "length_runaway", "skipped_update"),
        *("zero_reward", "format_fall", "d_acc_jump", "score_drift", "constant_length", "length_corr"),
    ],
)
def test_a_continued_watch_is_the_uninterrupted_one(rule: str) -> None:
    """Wherever it is cut; its memory goes through JSON. And a file's rows give what the run's figures gave."""
    figures, _ = fault(rule)
    rows = [row | figures if step >= ONSET else row for step, row in enumerate(healthy(LAST), start=1)]
    whole = findings(rows)
    assert whole
    for cut in range(LAST + 1):
        first, second = Watch(TABLE), Watch(TABLE)
        before = findings(rows[:cut], first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        after = [alarm for step in range(cut + 1, LAST + 1) for alarm in second(step, rows[step - 1])]
        assert before + after == whole
        assert second.state_dict() == json.loads(json.dumps(second.state_dict()))
    assert findings([json.loads(json.dumps(row)) for row in rows]) == whole


def choose(**changes: Any) -> dict:
    options: dict[str, Any] = {"ignore": [], "stop": [], "limits": {}, "parity_tolerance": 0.25, "max_skipped_steps": 5}
    return {
        rule.name: rule
        for rule in chosen_rules(
            **(options | {"signed_kl": False, "moving_rewards": False, "own_answers": True} | changes)
        )
    }


def test_options_choose() -> None:
    rules = choose(ignore=["pad_is_eos"], stop=["grad_spike"], limits={"truncated": 0.5})
    assert set(RULES) - set(rules) == {"pad_is_eos"}
    assert set(RULES) - set(choose(moving_rewards=True)) == {"reward_fall", "zero_reward"}
    assert set(RULES) - set(choose(own_answers=False)) == {"entropy_collapse", "entropy_low"}
    assert (rules["parity"].limit, rules["skipped_in_a_row"].patience, rules["truncated"].limit) == (0.25, 5, 0.5)
    assert rules["grad_spike"].action is Action.stop and RULES["grad_spike"].action is Action.warn
    assert (rules["negative_kl"].limit, choose(signed_kl=True)["negative_kl"].limit) == (-1e-4, -0.05)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ignore": ["pad_eos"]}, "guards.ignore names 'pad_eos', which is no rule; did you mean 'pad_is_eos'?"),
        ({"stop": ["reward_drop"]}, "guards.stop names 'reward_drop', which is no rule; did you mean 'reward_fall'?"),
        ({"limits": {"entropy_lo": 1}}, "guards.limits names 'entropy_lo', which is no rule; did you mean"),
        ({"limits": {"skipped_in_a_row": 4}}, "this one is set by guards.max_skipped_steps"),
    ],
)
def test_options_that_do_not_fit(changes: dict, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        choose(**changes)


def documentation() -> str:
    """The table as docs/guards.md has it."""
    lines = ["| rule | fires when | does | likely cause | to try |", "|---|---|---|---|---|"]
    for rule in TABLE:
        figures = ", ".join(f"`{figure}`" for figure in rule.figures)
        limit = f" (`{rule.option}`)" if rule.option else ""
        cells = (f"`{rule.name}`", f"{figures} {rule.condition()}{limit}", rule.action.value, rule.cause, rule.remedy)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_the_documentation_has_the_table() -> None:
    assert documentation() in (ROOT / "docs" / "guards.md").read_text(), documentation()


def test_figures_and_options_that_rules_name_exist() -> None:
    metrics = "".join((ROOT / "docs" / name).read_text() for name in ("metrics.md", "sdpo.md", "expert_iteration.md"))
    spelled = set(re.findall(r"`([^`\n]+)`", metrics))
    for name in list(spelled):
        if match := re.fullmatch(r"(.*)\{(.*)\}", name):
            spelled |= {match[1] + part for part in match[2].split(",")}
    options = {*options_of(GrpoConfig), *options_of(SdpoConfig), *options_of(ExpertIterationConfig)}
    sections = {option.split(".")[0] for option in options}
    for rule in TABLE:
        for figure in rule.reads:
            assert figure in spelled, (rule.name, figure)
        for name in re.findall(r"\b[a-z_]+\.[a-z_]+\b", f"{rule.remedy} {rule.option}"):
            assert name in options or name.split(".")[0] not in sections, (rule.name, name)
