"""An evaluation's pure parts: intervals, summaries, files of samples, solved examples."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_rl.config.rules import ConfigError
from megatron_rl.metrics.intervals import Z, normal, wilson


def test_wilson() -> None:
    """Against its closed form at 0, 1 and a half, and as the roots of |p - x| = z sqrt(x (1 - x) / n)."""
    assert pytest.approx(1.959964, abs=1e-6) == Z
    z2 = Z * Z
    assert wilson(0, 10) == (0.0, pytest.approx(z2 / (10 + z2)))
    assert wilson(10, 10) == (pytest.approx(10 / (10 + z2)), 1.0)
    half = 0.5 * math.sqrt(z2 / (10 + z2))
    assert wilson(5, 10) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))
    for successes, trials in ((1, 7), (20, 23), (1, 1000)):
        for bound in wilson(successes, trials):
            assert abs(successes / trials - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / trials))


def test_normal() -> None:
    # Deviation of 0, 0, 1, 1 is sqrt(1 / 3).
    half = Z * math.sqrt(1 / 3) / 2
    assert normal([0.0, 0.0, 1.0, 1.0]) == (0.0, 1.0) and half > 0.5
    low, high = normal([0.0, 0.0, 1.0, 1.0] * 25)
    assert (low, high) == pytest.approx((0.5 - Z * math.sqrt(25 / 99) / 10, 0.5 + Z * math.sqrt(25 / 99) / 10))
    assert normal([0.5]) == (0.0, 1.0) and normal([0.25] * 3) == (0.25, 0.25)


def line(problem: int, draw: str | int, response: str, accuracy: float | None, form: float = 1.0, **more: Any) -> dict:
    reason = "timeout" if accuracy is None else None
    parts = {} if accuracy is None else {"accuracy": accuracy, "format": form}
    own = {"problem": problem, "draw": draw, "prompt": f"q{problem}", "response": response, "reward": accuracy}
    return {**own, "parts": parts, "reason": reason, "feedback": None, "finish_reason": "stop", "tokens": 3, **more}


LINES = [
    *(line(0, "greedy", "<answer>7</answer>", 1.0), line(0, 0, "7", 1.0), line(0, 1, "8", 0.0)),
    *(line(1, "greedy", "<answer>|\n8</answer>", 0.0, tokens=9), line(1, 0, "8", 0.0), line(1, 1, "8", 0.0)),
    *(line(2, "greedy", "so 1,000", 0.0, 0.0, finish_reason="length"), line(2, 0, "", None), line(2, 1, "9", 1.0)),
    *(line(3, "greedy", "x 1000", None), line(3, 0, "", 1.0), line(3, 1, "", 1.0)),
]


def test_a_summary_counts_what_there_is() -> None:
    from megatron_rl.trainers.evaluation_report import as_markdown, summarize

    found = summarize(LINES, 2)
    figures = found["figures"]
    assert [figures[f"val/{name}"] for name in ("accuracy", "correct", "format_only", "format_wrong")] == [
        0.25,
        0.25,
        0.25,
        0.5,
    ]
    # Right draws 1, 0, 1 and 2 of two.
    assert (figures["val/pass@1"], figures["val/pass@2"]) == (0.5, 0.75)
    assert found["intervals"]["val/correct"] == list(wilson(1, 4))
    assert found["intervals"]["val/pass@1"] == list(normal([0.5, 0.0, 0.5, 1.0]))
    assert {name: of["count"] for name, of in found["classes"].items()} == {
        "correct": 1,
        "format_only": 1,
        "format_wrong": 2,
    }
    assert [example["problem"] for example in found["classes"]["format_wrong"]["examples"]] == [2, 3]
    assert found["response_length"] == {"mean": 4.5, "median": 3.0, "max": 9}
    assert found["classes"]["format_only"]["response_length"] == {"mean": 9, "median": 9, "max": 9}
    assert figures["val/truncated"] == 0.25 and figures["val/reward_failed"] == 1
    assert found["wrong_answers"][0] == {"answer": "1000", "count": 2, "share": pytest.approx(2 / 3)}
    assert found["failures"] == {"timeout": 2}
    text = as_markdown({"weights": "w", "data": "d", "val": found})
    assert "| val/correct | 0.25 | 0.046 to 0.699 |" in text and "| \\| 8 | 1 | 33.3% |" in text
    assert "| format_wrong | 2 | 3 | 3 | 3 |" in text and "| timeout | 2 |" in text
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>1</answer> <answer> 2 </answer>", "2"),
        ("<answer>3 and no end", "3 and no end"),
        (r"\boxed{1} then \boxed{\frac{1}{2}} is 5", r"\frac{1}{2}"),
        (r"\boxed{4} and \boxed{5", "5"),
        ("I have 3 of -1,200.50", "-1200.5"),
        ("nothing", "(none)"),
    ],
)
def test_the_answer_in_a_response(response: str, answer: str) -> None:
    from megatron_rl.trainers.evaluation_report import extracted

    assert extracted(response) == answer


def test_samples_go_on_after_the_last_whole_chunk(tmp_path: Path) -> None:
    from megatron_rl.trainers.evaluation_files import SampleFile

    file, wanted = SampleFile(tmp_path / "run" / "samples.jsonl", 3), {"weights": "a", "eval.seed": 1}

    def opened(resume: bool = True, **changes: Any) -> int:
        return file.open(wanted | changes, resume=resume, problems=4, chunk=2)

    assert opened() == 0
    file.append(LINES[:6])
    assert opened() == 2
    with file.path.open("a") as broken:
        broken.write(json.dumps(LINES[6]) + "\n" + '{"problem": 2, "dr')
    assert opened() == 2
    assert file.read() == LINES[:6]
    file.append(LINES[6:9])
    # Half a chunk is answered again, with the same neighbours; the last chunk may be shorter.
    assert file.open(wanted, resume=True, problems=3, chunk=2) == 3 and opened() == 2
    file.append(LINES[6:])
    assert opened() == 4 and file.read() == LINES
    with pytest.raises(ConfigError, match=r"another evaluation \(eval.seed is 1 there and 2 here; other weights\)"):
        opened(weights="b", **{"eval.seed": 2})
    assert file.read() == LINES
    assert opened(resume=False, weights="b") == 0 and file.read() == []


def test_examples_come_first(tmp_path: Path) -> None:
    from megatron_rl.data.shots import FewShotEncoder, read_shots
    from megatron_rl.data.tokenizer import load_tokenizer
    from tests.models import ascii_tokenizer

    ascii_tokenizer(tmp_path)
    rows = [{"q": f"{i}+1?", "a": f" {i + 1}"} for i in range(3)]
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shots = read_shots(str(tmp_path / "shots.jsonl"), 2, prompt_key="q", response_key="a")
    assert shots == (("0+1?", " 1"), ("1+1?", " 2"))

    def text(**options: Any) -> str:
        encode = FewShotEncoder(
            tokenizer=load_tokenizer(tmp_path), max_prompt_tokens=200, prompt_key="q", shots=shots, **options
        )
        return encode(0, {"q": "5+1?"}).text

    assert text(chat="never", template="Q: {question}") == "Q: 0+1? 1\n\nQ: 1+1? 2\n\nQ: 5+1?"
    turns = "user: 0+1?\nassistant:  1\nuser: 1+1?\nassistant:  2\nuser: 5+1?\nassistant: "
    assert text() == turns


def test_what_a_terminal_and_a_pipe_show(capsys: pytest.CaptureFixture) -> None:
    import io

    from rich.console import Console

    from megatron_rl.metrics.answering import AnsweredBar, display

    lines = display(8, "val")
    lines.show(2, 0.5)
    lines.close()
    assert capsys.readouterr().out == "val: 2/8 problems  accuracy 0.5\n"
    screen = io.StringIO()
    bar = AnsweredBar(8, "val", Console(file=screen, force_terminal=True, width=100))
    bar.show(2, 0.5)
    bar.close()
    assert "2/8" in screen.getvalue() and "accuracy 0.5" in screen.getvalue()
