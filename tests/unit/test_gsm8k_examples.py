"""The GSM8K examples: the tiny task and its tokens, GSM8K made into rows, and configs that `check` accepts."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.data.templates import fill_template, load_template
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.rewards import resolve
from megatron_rl.types import Prompt, Reward, Rollout
from tests.models import ascii_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
STAGES = ("sft", "expert_iteration", "grpo")
# vocabulary, hidden, feed-forward, layers, heads, key/value heads and tied embeddings as published
SIZES = {
    "qwen2.5_0.5b": ("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5_math_1.5b": ("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "qwen3_8b": ("qwen3", 151936, 4096, 12288, 36, 32, 8, False),
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gsm8k_{name}", EXAMPLES / "gsm8k" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score(row: dict[str, str], response: str) -> float:
    """What the configs' reward makes of a response to a row."""
    prompt = Prompt(index=0, text="", token_ids=(1,), row=row)
    rollout = Rollout(
        prompt_index=0,
        sample_index=0,
        token_ids=(1,),
        text=response,
        log_probs=(0.0,),
        log_kept_mass=(0.0,),
        finish_reason="stop",
        policy_version=0,
    )
    reward = resolve("r1_zero_strict")(prompt, rollout)
    assert isinstance(reward, Reward) and reward.parts["format"] == 1
    return reward.value


def test_tiny_data(tmp_path: Path) -> None:
    tiny = script("tiny")
    tiny.make_data(tmp_path, seed=2)
    train, held_out = rows(tmp_path / "train.jsonl"), rows(tmp_path / "heldout.jsonl")
    assert (len(train), len(held_out)) == (3700, 300)

    def numbers(row: dict[str, str]) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", row["question"])))

    assert not {numbers(row) for row in train} & {numbers(row) for row in held_out}
    for row in train + held_out:
        assert int(row["answer"].rpartition("#### ")[2]) == sum(numbers(row))
    demonstrations = rows(tmp_path / "sft.jsonl")
    assert len(demonstrations) == 6 * len(train)
    assert {numbers(row) for row in demonstrations} == {numbers(row) for row in train}
    # Two of three problems need a carry, and five of six demonstrations of it forget it.
    right = [score(row, row["response"]) for row in demonstrations[:900]]
    assert sum(right) / len(right) == pytest.approx(1 - 2 / 3 * 5 / 6, abs=0.04)


def test_the_tiny_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    tiny = script("tiny")
    tiny.make_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    template = load_template(str(EXAMPLES / "gsm8k" / "tiny_template.txt"))
    stage = {name: yaml.safe_load((EXAMPLES / f"{name}_gsm8k" / "tiny.yaml").read_text()) for name in STAGES}
    stories = [story.format(name="Ben", other="Tom", things="plums", a=47, b=98) for story in tiny.STORIES]
    for problem in [tiny.Problem(47, 98, story) for story in stories]:
        prompt, response = fill_template(template, problem.question), problem.response(problem.result)
        ids, answer = tokenizer(prompt)["input_ids"], tokenizer(response, add_special_tokens=False)["input_ids"]
        for text, tokens in ((prompt, ids), (response, answer)):
            assert tokenizer.pad_token_id not in tokens
            assert tokenizer.decode(tokens, skip_special_tokens=True) == text
        assert score(problem.row(), response) == 1 and score(problem.row(), problem.response(problem.careless)) == 0
        for name in STAGES:
            assert len(ids) <= stage[name]["data"]["max_prompt_tokens"]
            assert len(answer) < stage[name]["rollout"]["max_new_tokens"]
    assert tokenizer.convert_ids_to_tokens(ids[-1:]) == ["<think>"]


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    prepare = script("prepare")
    solution = "He had 5*240 = $<<5*240=1200>>1,200 and spent\n$<<1=1>>1.\n#### 1,199"
    made = {"question": " How much? ", "answer": solution}
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(made) + "\n")
    arguments = ["--train", f"{tmp_path}/a.jsonl", "--test", f"{tmp_path}/b.jsonl", "--out", f"{tmp_path}/out"]
    monkeypatch.setattr("sys.argv", ["prepare.py", *arguments])
    prepare.main()
    assert capsys.readouterr().out.endswith("test.jsonl: 1 rows\n")
    (row,) = rows(tmp_path / "out" / "test.jsonl")
    assert row == {
        "question": "How much?",
        "answer": "1199",
        "response": " He had 5*240 = $1,200 and spent\n$1. </think> <answer>1199</answer>",
    }
    assert rows(tmp_path / "out" / "train.jsonl") == [row] and score(row, row["response"]) == 1
    with pytest.raises(ValueError, match="does not end in #### and a number"):
        prepare.convert("q", "It is twelve.\n#### twelve")


@pytest.mark.parametrize(
    "model",
    [
        "qwen2.5_math_1.5b",
        pytest.param("qwen2.5_0.5b", marks=pytest.mark.full),
        pytest.param("qwen3_8b", marks=pytest.mark.full),
    ],
)
def test_check_accepts_the_cluster_configs(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """With a directory that has the model's own sizes, a tokenizer of characters, and no weights."""
    from transformers import Qwen2Config, Qwen3Config

    family, vocabulary, hidden, feed_forward, layers, heads, kv_heads, tied = SIZES[model]
    ascii_tokenizer(tmp_path)
    {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **({"head_dim": 128} if family == "qwen3" else {}),
        max_position_embeddings=32768,
        architectures=[f"{family.capitalize()}ForCausalLM"],
    ).save_pretrained(tmp_path)
    response = " 1+1=2 </think> <answer>2</answer>"
    for split in ("train", "test"):
        line = json.dumps({"question": "How much is 1+1?", "answer": "2", "response": response}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(line * 2)
    monkeypatch.chdir(EXAMPLES.parent)
    changes = [f"model.path={tmp_path}", "model.weights=random", "data.max_prompt_tokens=1000"]
    changes += [f"data.train={tmp_path}/train.jsonl", f"data.val={tmp_path}/test.jsonl"]
    for stage in STAGES:
        assert main(["check", str(EXAMPLES / f"{stage}_gsm8k" / f"{model}.yaml"), *changes]) == 0, stage
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("2 rows to train on, 2 held out") == 3
