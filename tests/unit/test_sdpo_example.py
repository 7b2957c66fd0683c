"""The SDPO example: its contexts are those that the trainer will make, and its reward says what is wrong."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.data.reprompt import RepromptOptions, evidence, teacher_prompt
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.rewards import resolve
from megatron_rl.types import Prompt, Rollout, RolloutGroup
from tests.models import ascii_tokenizer, tiny_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "sdpo"
REPROMPT = yaml.safe_load((EXAMPLE / "sibling.yaml").read_text())["reprompt"]


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with its directory on the path, as when it is run."""
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "reward", raising=False)
    spec = importlib.util.spec_from_file_location("sdpo_task", EXAMPLE / "task.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(prompt: Prompt, number: int, text: str) -> Rollout:
    return Rollout(
        prompt_index=prompt.index,
        sample_index=number,
        token_ids=tuple(range(len(text))),
        text=text,
        log_probs=(0.0,) * len(text),
        log_kept_mass=(0.0,) * len(text),
        finish_reason="stop",
        policy_version=0,
    )


@pytest.mark.parametrize(
    ("answer", "response", "remark"),
    [
        ("132", "132", None),
        ("132", " 132", None),
        ("132", "122", "122: low tens"),
        ("104", "94", "94: high tens, low hundreds"),
        ("94", "104", "104: low tens, high hundreds"),
        ("99", "88", "88: low ones, low tens"),
        ("99", "9", "9: low tens"),
        ("99", "1+2", "1+2: no number"),
        ("99", "099", "099: no number"),
        ("99", "1099", "1099: no number"),
        ("99", "", ": no number"),
    ],
)
def test_feedback_names_the_digits_that_are_wrong_and_how(answer: str, response: str, remark: str | None) -> None:
    prompt = Prompt(index=0, text="", token_ids=(1,), row={"answer": answer})
    reward = resolve(f"{EXAMPLE / 'reward.py'}:addition")(prompt, answered(prompt, 0, response))
    assert (reward.value, reward.parts, reward.feedback) == (float(remark is None), {"accuracy": reward.value}, remark)


@pytest.mark.parametrize(
    ("response", "remark"),
    [
        ("2 * 6 = 12", None),
        ("1,200", "The answer ends in 1200, which is too large."),
        ("12 or -12", "The answer ends in -12, which is too small."),
        ("twelve", "There is no number in the answer. End it with one."),
    ],
)
def test_feedback_of_the_cluster_example(response: str, remark: str | None) -> None:
    prompt = Prompt(index=0, text="", token_ids=(1,), row={"answer": "12"})
    judge = resolve(f"{EXAMPLE.with_name('cluster') / 'reward.py'}:number")
    reward = judge(prompt, answered(prompt, 0, response))
    assert (reward.value, reward.feedback) == (float(remark is None), remark)


@pytest.mark.parametrize(("name", "micro_batches"), [("sibling", 37), ("feedback", 2)])
def test_check_accepts_the_cluster_examples(
    name: str, micro_batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As they stand, but for the engine and the model: a small one with a chat template and four groups of keys."""
    pytest.importorskip("reasoning_gym")
    tiny_model(tmp_path, "qwen3", vocab_size=ascii_tokenizer(tmp_path))
    capsys.readouterr()
    monkeypatch.chdir(EXAMPLE.parents[1])
    options = [f"model.path={tmp_path}", "rollout.engine=hf"]
    assert main(["check", f"examples/cluster/sdpo_qwen3_8b_{name}.yaml", *options]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "20000 rows to train on, 256 held out" in said.out
    assert "layout       tp=4 pp=1 vpp=1" in said.out and f"first update {micro_batches} micro" in said.out


@pytest.mark.parametrize(
    ("kind", "feedback", "answers"), [("solution", "never", 2), ("feedback", "always", 1), ("both", "always", 2)]
)
def test_the_warm_start_has_the_contexts_of_the_trainer(
    task: ModuleType, tmp_path: Path, kind: str, feedback: str, answers: int
) -> None:
    """A wrong answer and a right one, scored and shown as in training, give the prompts of the data to the letter."""
    task.make_data(tmp_path, seed=1)
    judge = resolve(f"{EXAMPLE / 'reward.py'}:addition")
    options = RepromptOptions(**REPROMPT | {"feedback": feedback})
    problems = rows(tmp_path / "heldout.jsonl")
    assert len(problems) == task.HELD_OUT
    for row, shown in zip(problems, rows(tmp_path / f"heldout_{kind}.jsonl"), strict=True):
        wrong = shown["prompt"].partition("Earlier: ")[2].partition(":")[0]
        prompt = Prompt(index=0, text=row["prompt"], token_ids=(1,), row=row)
        rollouts = tuple(answered(prompt, n, text) for n, text in enumerate([wrong, row["answer"]][:answers]))
        rewards = tuple(judge(prompt, rollout) for rollout in rollouts)
        assert [reward.value for reward in rewards] == [0, 1][:answers]
        group = RolloutGroup(prompt=prompt, rollouts=rollouts, rewards=rewards)
        assert teacher_prompt(row["prompt"], evidence(group, options)[0], options) == shown["prompt"]


def test_data(task: ModuleType, tmp_path: Path) -> None:
    task.make_data(tmp_path / "data", seed=2)
    train, held_out = rows(tmp_path / "data" / "train.jsonl"), rows(tmp_path / "data" / "heldout.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    demonstrations = rows(tmp_path / "data" / "sft.jsonl")
    plain = [row for row in demonstrations if row["prompt"][0].isdigit()]
    assert len(plain) == len(demonstrations) // 2 == 3 * len(train)
    # No held-out problem is demonstrated, with a context or without.
    assert {row["prompt"].rpartition(" ")[2] for row in demonstrations} == {row["prompt"] for row in train}
    wrong = [row for row in demonstrations if row["response"] != row["answer"]]
    assert all(row["prompt"][0].isdigit() for row in wrong)
    # Two of three problems need a carry, and two of three demonstrations of it forget it.
    assert len(wrong) / len(plain) == pytest.approx(4 / 9, abs=0.01)


def test_the_tokenizer_reads_every_template(task: ModuleType, tmp_path: Path) -> None:
    task.make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    texts = [str(getattr(options, name)) for options in (RepromptOptions(), task.OPTIONS) for name in REPROMPT]
    text = "".join(texts)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text) and tokenizer.decode(ids) == text and tokenizer.pad_token_id not in ids
    assert len(tokenizer) >= 100  # the k of sibling.yaml
