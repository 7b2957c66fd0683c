"""What an evaluation found, from its samples alone: figures, intervals, classes, examples, wrong answers."""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from megatron_rl.metrics.intervals import normal, wilson
from megatron_rl.rewards.boxed import last_box
from megatron_rl.rewards.exact import last_number
from megatron_rl.rewards.pool import count_failures
from megatron_rl.trainers.evaluate import (
    CLASSES,
    Greedy,
    answer_class,
    counted_draws,
    estimates_at_k,
    held_out_figures,
    is_correct,
)
from megatron_rl.trainers.evaluation_files import Record, reward_of

EXAMPLES, SHOWN_CHARACTERS, WRONG_ANSWERS = 2, 400, 10
NO_ANSWER = "(none)"
_TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def summarize(records: Sequence[Record], draws: int, name: str = "val") -> dict[str, Any]:
    """Everything that summary.json says of one model. Classes, lengths and wrong answers are of the greedy answers."""
    greedy = [record for record in records if record["draw"] == "greedy"]
    answers = [
        Greedy(reward=reward_of(r), tokens=r["tokens"], truncated=r["finish_reason"] == "length") for r in greedy
    ]
    correct = correct_draws(records, draws)
    kinds = [answer_class(answer.reward) for answer in answers]
    right = sum(is_correct(answer.reward) for answer in answers)
    intervals = {f"{name}/accuracy": wilson(right, len(answers))}
    intervals |= {f"{name}/{kind}": wilson(kinds.count(kind), len(answers)) for kind in CLASSES}
    for k in counted_draws(draws) if draws else []:
        intervals[f"{name}/pass@{k}"] = normal(estimates_at_k(correct, draws, k))
    wrong = Counter(extracted(r["response"]) for r, answer in zip(greedy, answers) if not is_correct(answer.reward))
    return {
        "problems": len(answers),
        "draws": draws,
        "figures": held_out_figures(name, answers, correct, draws),
        "intervals": {key: list(interval) for key, interval in intervals.items()},
        "classes": {kind: _of_class([r for r, k in zip(greedy, kinds) if k == kind]) for kind in CLASSES},
        "response_length": lengths(greedy),
        "wrong_answers": [
            {"answer": answer, "count": count, "share": count / wrong.total()}
            for answer, count in wrong.most_common(WRONG_ANSWERS)
        ],
        "failures": dict(count_failures(map(reward_of, records)).most_common()),
    }


def correct_draws(records: Sequence[Record], draws: int) -> list[int]:
    """How many draws of each problem are right; nothing without draws."""
    size = draws + 1
    groups = [records[start : start + size] for start in range(0, len(records), size)] if draws else []
    return [sum(is_correct(reward_of(record)) for record in group if record["draw"] != "greedy") for group in groups]


def _of_class(members: Sequence[Record]) -> dict[str, Any]:
    examples = [{"problem": r["problem"], "prompt": r["prompt"], "response": r["response"]} for r in members[:EXAMPLES]]
    return {"count": len(members), "response_length": lengths(members), "examples": examples}


def lengths(records: Sequence[Record]) -> dict[str, float] | None:
    """Tokens of the responses; None where there are none."""
    tokens = [record["tokens"] for record in records]
    return {"mean": fmean(tokens), "median": median(tokens), "max": max(tokens)} if tokens else None


def extracted(response: str) -> str:
    r"""The answer in a response: the text of its last <answer>, else of its last \boxed{}, else its last number."""
    if tagged := _TAGGED.findall(response):
        return tagged[-1].strip()
    if (box := last_box(response)) is not None:
        return box.strip()
    number = last_number(response)
    return NO_ANSWER if number is None else f"{number:g}"


def as_markdown(summary: dict[str, Any]) -> str:
    """The summary of an evaluation, as a person reads it."""
    lines = [f"# {summary['weights']} on {summary['data']}", ""]
    for name in ("val", "val_average"):
        if name in summary:
            lines += [*([] if name == "val" else ["## The averaged weights", ""]), *_section(summary[name])]
    return "\n".join(lines)


def _section(found: dict[str, Any]) -> list[str]:
    lines = [f"{found['problems']} problems, greedy answers, {found['draws']} draws each. Intervals are of 95%.", ""]
    lines += ["| figure | value | interval |", "|---|---:|---:|"]
    for key, value in found["figures"].items():
        low, high = found["intervals"].get(key, (None, None))
        lines.append(f"| {key} | {value:.4g} | {'' if low is None else f'{low:.3f} to {high:.3f}'} |")
    lines += ["", "| greedy answers | count | tokens: mean | median | max |", "|---|---:|---:|---:|---:|"]
    rows = {**found["classes"], "all": {"count": found["problems"], "response_length": found["response_length"]}}
    for kind, of in rows.items():
        length = of["response_length"]
        cells = " | ".join(f"{length[key]:.4g}" for key in ("mean", "median", "max")) if length else "| | "
        lines.append(f"| {kind} | {of['count']} | {cells} |")
    if found["wrong_answers"]:
        lines += ["", "| most common wrong answers | count | share of wrong |", "|---|---:|---:|"]
        for item in found["wrong_answers"]:
            lines.append(f"| {_cell(item['answer'])} | {item['count']} | {item['share']:.1%} |")
    if found["failures"]:
        lines += ["", "| could not be judged | samples |", "|---|---:|"]
        lines += [f"| {reason} | {count} |" for reason, count in found["failures"].items()]
    for kind, of in found["classes"].items():
        for example in of["examples"]:
            lines += ["", f"{kind}, problem {example['problem']}:", ""]
            lines += [f"    {line}" for line in _shortened(example["prompt"]).split("\n")]
            lines += ["    ----", *(f"    {line}" for line in _shortened(example["response"]).split("\n"))]
    return [*lines, ""]


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"


def _cell(text: str) -> str:
    return _shortened(text).replace("|", "\\|").replace("\n", " ")
