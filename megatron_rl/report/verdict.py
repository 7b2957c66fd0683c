"""Whether a critic's training was a success, in five rows."""

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from megatron_rl.metrics.rules import RULES
from megatron_rl.report.series import Curve, RunData

EARLY_STEP = 10
_LATEST = 3
GAP, ACCURACY, CORRELATION, STUDENT, HARD = (
    "critic/identical_text_gap",
    "critic/d_acc",
    "reward/length_corr",
    "critic/student_value_mean",
    "critic/hard_sample_ratio",
)


class Result(StrEnum):
    passed = "pass"
    failed = "fail"
    unknown = "not measured"


class Row(NamedTuple):
    """One question, and its answer with the number."""

    question: str
    result: Result
    number: str


def is_critic_run(run: RunData) -> bool:
    """Whether it trained a critic that tells teachers from students."""
    return any(name in run.curves for name in (ACCURACY, GAP, STUDENT, HARD))


def verdict(run: RunData) -> list[Row]:
    """The five rows; their limits are those of the rules."""
    gap, accuracy, correlation, drift, hard = (
        RULES[name].limit
        for name in ("identical_text_gap", "d_acc_saturated", "length_corr", "score_drift", "hard_samples")
    )
    return [
        _identical_texts(run, gap),
        _early_accuracy(run, accuracy),
        _length(run, correlation),
        _student(run, drift),
        _hard_samples(run, hard),
    ]


def _identical_texts(run: RunData, limit: float) -> Row:
    question = f"identical texts are scored less than {limit:g} apart"
    curve = _curve(run, GAP)
    if curve is None:
        return _unknown(question)
    place = int(np.argmax(curve.values))
    return _row(
        question, curve.values[place] < limit, f"{curve.values[place]:.3g} at most, at step {curve.steps[place]}"
    )


def _early_accuracy(run: RunData, limit: float) -> Row:
    question = f"at step {EARLY_STEP} fewer than {limit:.0%} of the pairs are told apart"
    curve = _curve(run, ACCURACY)
    if curve is None or curve.steps[-1] < EARLY_STEP or curve.steps[0] > EARLY_STEP:
        return _unknown(question)
    place = int(np.searchsorted(curve.steps, EARLY_STEP, side="right")) - 1
    return _row(question, curve.values[place] < limit, f"{curve.values[place]:.1%} at step {curve.steps[place]}")


def _length(run: RunData, limit: float) -> Row:
    question = f"the score goes with length by less than {limit:g}"
    curve = _curve(run, CORRELATION)
    if curve is None:
        return _unknown(question)
    mean = float(np.mean(curve.values[-_LATEST:]))
    return _row(question, abs(mean) < limit, f"{mean:+.3f}, {_when(curve)}")


def _student(run: RunData, limit: float) -> Row:
    question = f"the student's score stays within {limit:g} of where it began"
    curve = _curve(run, STUDENT)
    if curve is None:
        return _unknown(question)
    first = curve.values[0]
    place = int(np.argmax(np.abs(curve.values - first)))
    return _row(
        question,
        abs(curve.values[place] - first) < limit,
        f"{first:.2f} at step {curve.steps[0]}, {curve.values[place]:.2f} at step {curve.steps[place]}",
    )


def _hard_samples(run: RunData, limit: float) -> Row:
    question = f"more than {limit:.0%} of the pairs are hard to tell apart"
    curve = _curve(run, HARD)
    if curve is None:
        return _unknown(question)
    mean = float(np.mean(curve.values[-_LATEST:]))
    return _row(question, mean > limit, f"{mean:.1%}, {_when(curve)}")


def _curve(run: RunData, name: str) -> Curve | None:
    """What is finite of a figure; None where nothing is."""
    curve = run.curves[name].finite() if name in run.curves else None
    return curve if curve is not None and len(curve.steps) else None


def _when(curve: Curve) -> str:
    steps = curve.steps[-_LATEST:]
    return f"at step {steps[-1]}" if len(steps) == 1 else f"mean of steps {steps[0]} to {steps[-1]}"


def _row(question: str, passed: bool, number: str) -> Row:
    return Row(question, Result.passed if passed else Result.failed, number)


def _unknown(question: str) -> Row:
    return Row(question, Result.unknown, "")
