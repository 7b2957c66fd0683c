"""What is wrong with a run: the rules that watch a live run, over its whole length, and what only the whole shows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_rl.metrics.rules import RULES, TABLE, Rule, chosen_rules
from megatron_rl.metrics.watch import Alarm, Watch
from megatron_rl.report.gaps import Gap, gaps
from megatron_rl.report.series import RunData

_SHOWN_STEPS = 6


class Severity(StrEnum):
    """`severe`: the run is not worth going on with as it is."""

    severe = "severe"
    warning = "warning"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, since which step, and what to do about it."""

    name: str
    severity: Severity
    step: int
    evidence: str
    cause: str
    remedy: str


def findings(run: RunData) -> list[Finding]:
    """Everything, the severe first."""
    found = [*_of_rules(run), *_of_gaps(gaps(run)), *_of_damages(run)]
    return sorted(found, key=lambda finding: (finding.severity is not Severity.severe, finding.step))


def is_severe(found: list[Finding]) -> bool:
    return any(finding.severity is Severity.severe for finding in found)


def rules_of(run: RunData) -> list[Rule]:
    """Those that the run was watched by, where it has a config of ours; otherwise the table."""
    config = run.config
    guards = config.get("guards")
    if not isinstance(config.get("trainer"), str) or not isinstance(guards, Mapping):
        return list(TABLE)
    tolerance = config.get("rollout", {}).get("parity_tolerance")
    return chosen_rules(
        ignore=guards.get("ignore", []),
        stop=guards.get("stop", []),
        limits=guards.get("limits", {}),
        parity_tolerance=RULES["parity"].limit if tolerance is None else tolerance,
        max_skipped_steps=guards.get("max_skipped_steps", RULES["skipped_in_a_row"].patience),
        signed_kl=config.get("kl", {}).get("estimator") == "k1",
        moving_rewards=config["trainer"] == "gad",
        own_answers=config["trainer"] != "sft",
    )


def _of_rules(run: RunData) -> Iterator[Finding]:
    """One finding for each rule and figure: what the rules find in the figures, and alarms of the run beside them."""
    rules = rules_of(run)
    watch = Watch(rules)
    alarms: dict[tuple[str, str], list[Alarm]] = {}
    for step, row in run.rows(sorted({name for rule in rules for name in rule.reads})):
        for alarm in watch(step, row):
            alarms.setdefault((alarm.rule.name, alarm.figure), []).append(alarm)
    for of_one in alarms.values():
        yield _of_alarms(run, of_one)
    # A rule that stops a run within a step leaves no figures of that step.
    for row in run.alarms:
        name, figure = str(row.get("rule")), str(row.get("figure"))
        if (name, figure) not in alarms:
            yield _of_record(row)


def _of_alarms(run: RunData, alarms: list[Alarm]) -> Finding:
    first, figure = alarms[0], alarms[0].figure
    evidence = f"step {first.step}: {first.seen}"
    if len(alarms) > 1:
        again = [str(alarm.step) for alarm in alarms[1 : 1 + _SHOWN_STEPS]]
        more = ", ..." if len(alarms) > 1 + _SHOWN_STEPS else ""
        evidence += f"; again at step {', '.join(again)}{more} ({len(alarms)} times)"
    curve = run.curves[figure].finite()
    evidence += f"; it is {curve.values[-1]:.4g} at the last step, {curve.steps[-1]}"
    kept = [
        row["samples"]
        for row in run.alarms
        if (row.get("rule"), row.get("figure")) == (first.rule.name, figure) and "samples" in row
    ]
    if kept:
        evidence += f"; samples of the step are in {', '.join(map(str, kept[:_SHOWN_STEPS]))}"
    rule = first.rule
    return Finding(
        name=rule.name,
        severity=Severity.severe if rule.is_severe else Severity.warning,
        step=first.step,
        evidence=evidence,
        cause=rule.cause,
        remedy=rule.remedy,
    )


def _of_record(row: Mapping[str, Any]) -> Finding:
    """An alarm as the run wrote it."""
    rule = RULES.get(str(row.get("rule")))
    severe = row.get("action") == "stop" or (rule is not None and rule.is_severe)
    value, threshold = (row.get(key) for key in ("value", "threshold"))
    numbers = (
        f" is {value:.4g}, its threshold {threshold:.4g}"
        if isinstance(value, int | float) and isinstance(threshold, int | float) and math.isfinite(value)
        else ""
    )
    return Finding(
        name=str(row.get("rule")),
        severity=Severity.severe if severe else Severity.warning,
        step=int(row["step"]),
        evidence=f"step {row['step']}: {row.get('figure')}{numbers}, as the run's own alarm says",
        cause=rule.cause if rule else str(row.get("message", "")),
        remedy=rule.remedy if rule else "see alarms.jsonl",
    )


def _of_gaps(found: list[Gap]) -> Iterator[Finding]:
    for gap in found:
        yield Finding(
            name=gap.name,
            severity=Severity.severe if gap.for_good else Severity.warning,
            step=gap.step,
            evidence=gap.evidence,
            cause=gap.cause,
            remedy=gap.remedy,
        )


def _of_damages(run: RunData) -> Iterator[Finding]:
    if run.damages:
        yield Finding(
            name="damaged_files",
            severity=Severity.warning,
            step=0,
            evidence="; ".join(run.damages),
            cause="a process was killed while it wrote, a disk was full, or a copy was not complete",
            remedy="copy the files again if there is a sound copy; everything else was read",
        )
