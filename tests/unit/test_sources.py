"""Rows from files and tasks, encoding, and a cursor that continues exactly."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_rl.data.sources import (
    UNREPEATABLE_TASKS,
    ExampleEncoder,
    ExampleSource,
    PromptEncoder,
    PromptSource,
    Source,
    load_rows,
)


class Letters:
    """A tokenizer of characters: the part of the interface that plain prompts need."""

    chat_template = None
    eos_token_id, eos_token = 0, "\0"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


TOKENIZER: Any = Letters()
PROMPTS = PromptEncoder(tokenizer=TOKENIZER, max_prompt_tokens=20)


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def write_rows(path: Path, n: int) -> Path:
    rows = [{"prompt": f"q{i}", "answer": str(i), "response": f"r{i}"} for i in range(n)]
    if path.suffix == ".jsonl":
        return write_lines(path, *map(json.dumps, rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def make_source(tmp_path: Path, n: int = 7, seed: int = 1) -> PromptSource:
    return Source(load_rows(write_rows(tmp_path / "train.jsonl", n)), PROMPTS, seed=seed)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files(tmp_path: Path, suffix: str) -> None:
    rows = load_rows(write_rows(tmp_path / f"train{suffix}", 3))
    prompts = Source(rows, PROMPTS, seed=0).all()
    assert len(rows) == 3
    assert [prompt.index for prompt in prompts] == [0, 1, 2]
    assert prompts[1].text == "q1" and prompts[1].token_ids == (ord("q"), ord("1"))
    assert prompts[1].row == {"prompt": "q1", "answer": "1", "response": "r1"}


def test_examples(tmp_path: Path) -> None:
    rows = load_rows(write_rows(tmp_path / "train.jsonl", 3))
    source: ExampleSource = Source(rows, ExampleEncoder(prompt=PROMPTS), seed=0)
    assert [(prompt.text, response) for prompt, response in source.all()] == [("q0", "r0"), ("q1", "r1"), ("q2", "r2")]


def test_messages_survive_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "one"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": messages}]), tmp_path / "chat.parquet")
    assert load_rows(tmp_path / "chat.parquet")[0]["prompt"] == messages


def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    epochs = [[prompt.index for prompt in source.next(7)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [prompt.index for prompt in make_source(tmp_path, seed=2).next(7)] != epochs[0]


def test_the_order_is_fixed_for_good(tmp_path: Path) -> None:
    # Saved runs depend on these numbers.
    assert [prompt.index for prompt in make_source(tmp_path).next(10)] == [5, 6, 1, 2, 3, 4, 0, 6, 0, 5]


def test_draws_do_not_depend_on_their_size(tmp_path: Path) -> None:
    one, many = make_source(tmp_path), make_source(tmp_path)
    assert [one.next(1)[0] for _ in range(20)] == many.next(20)


def test_all_leaves_the_cursor(tmp_path: Path) -> None:
    source, other = make_source(tmp_path), make_source(tmp_path)
    source.next(3)
    source.all()
    other.next(3)
    assert source.next(5) == other.next(5)


@pytest.mark.parametrize("drawn", [0, 3, 7, 16])
def test_resume_continues_exactly(tmp_path: Path, drawn: int) -> None:
    source = make_source(tmp_path)
    source.next(drawn)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = make_source(tmp_path)
    resumed.next(9)
    resumed.load_state_dict(state)
    assert resumed.next(12) == source.next(12)
    assert resumed.state_dict() == source.state_dict()


def test_resume_refuses_other_data_or_seed(tmp_path: Path) -> None:
    state = make_source(tmp_path).state_dict()
    with pytest.raises(ValueError, match=r"seed=1 .* has seed=2"):
        make_source(tmp_path, seed=2).load_state_dict(state)
    with pytest.raises(ValueError, match=r"num_rows=7 .* has num_rows=8"):
        make_source(tmp_path, n=8).load_state_dict(state)
    edited = write_rows(tmp_path / "train.jsonl", 7)
    edited.write_text(edited.read_text().replace("q3", "Q3"))
    with pytest.raises(ValueError, match="digest="):
        Source(load_rows(edited), PROMPTS, seed=1).load_state_dict(state)


def test_a_failed_draw_can_be_drawn_again(tmp_path: Path) -> None:
    rows = load_rows(write_lines(tmp_path / "a.jsonl", '{"prompt": "one"}', '{"prompt": "a long prompt"}'))
    source = Source(rows, PromptEncoder(tokenizer=TOKENIZER, max_prompt_tokens=5), seed=0)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"a\.jsonl line 2: the prompt has 13 tokens, more than data.max_prompt_token"
        ):
            source.next(2)
    assert source.state_dict()["drawn"] == 0


def test_too_long_prompts_are_cut_on_the_chosen_side(tmp_path: Path) -> None:
    rows = load_rows(write_lines(tmp_path / "a.jsonl", '{"prompt": "abcdef"}'))
    encode = PromptEncoder(tokenizer=TOKENIZER, max_prompt_tokens=2, truncation_side="left")
    prompt = Source(rows, encode, seed=0).all()[0]
    assert prompt.token_ids == (ord("e"), ord("f")) and prompt.text == "abcdef"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], r"bad\.jsonl holds no rows"),
        (['{"prompt": "a"}', "", '{"prompt": '], r"bad\.jsonl line 3 is not valid JSON"),
        (['{"prompt": "a"}', "[1]"], r"bad\.jsonl line 2 must hold a JSON object, one record a line, not list"),
        (
            ['{"prompt": "a"}', "", '{"q": 1, "a": 2}'],
            r"bad\.jsonl line 3 has no 'prompt'; its fields are \['a', 'q'\]",
        ),
        (['{"prompt": null}'], r"bad\.jsonl line 1 has no 'prompt'"),
        (['{"prompt": "a"}', '{"prompt": 5}'], r"bad\.jsonl line 2: the prompt must be a string or a list"),
    ],
)
def test_bad_jsonl(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source(load_rows(write_lines(tmp_path / "bad.jsonl", *lines)), PROMPTS, seed=0).all()


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2 is not valid JSON"):
        load_rows(tmp_path / "bad.jsonl")


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(b"not parquet, but long enough to be read as one")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a parquet file"):
        load_rows(path)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", None], "answer": ["1", "2", "3"]}), path)
    with pytest.raises(ValueError, match=r"bad\.parquet row 2 has no 'prompt'"):
        Source(load_rows(path), PROMPTS, seed=0)
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), path)
    with pytest.raises(ValueError, match=r"row 0 has no 'prompt'; its fields are \['question'\]"):
        Source(load_rows(path), PROMPTS, seed=0)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(ValueError, match=r"bad\.parquet holds no rows"):
        Source(load_rows(path), PROMPTS, seed=0)


def test_an_example_needs_a_text_response(tmp_path: Path) -> None:
    encode = ExampleEncoder(prompt=PROMPTS)
    path = write_lines(tmp_path / "a.jsonl", '{"prompt": "a", "response": "b"}', '{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 has no 'response'"):
        Source(load_rows(path), encode, seed=0)
    rows = load_rows(write_lines(tmp_path / "b.jsonl", '{"prompt": "a", "response": 4}'))
    with pytest.raises(ValueError, match=r"b\.jsonl line 1: 'response' must be text, not 4"):
        Source(rows, encode, seed=0).all()


def test_load_rows_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read '.*train\.csv': name a \.jsonl file"):
        load_rows(tmp_path / "train.csv")
    with pytest.raises(ValueError, match=r"there is no file '.*none\.jsonl'"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="size and options are for reasoning-gym"):
        load_rows(write_rows(tmp_path / "train.jsonl", 2), size=1)
    with pytest.raises(ValueError, match=r"set data\.task\.size to the number of questions, not None"):
        load_rows("reasoning-gym:chain_sum")


@pytest.mark.full
def test_reading_files_leaves_home_alone(tmp_path: Path) -> None:
    home, path = tmp_path / "home", write_rows(tmp_path / "train.parquet", 2)
    home.mkdir()
    code = f"from megatron_rl.data.sources import load_rows; load_rows({str(path)!r})[1]"
    hidden = {"XDG_CACHE_HOME", "HF_HOME", "HF_DATASETS_CACHE"}
    env = {key: value for key, value in os.environ.items() if key not in hidden} | {"HOME": str(home)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def gym() -> Any:
    return pytest.importorskip("reasoning_gym")


def test_task_rows_can_be_scored(gym: Any) -> None:
    rows = load_rows("reasoning-gym:chain_sum", size=4, seed=3, options={"max_terms": 3})
    encode = PromptEncoder(tokenizer=TOKENIZER, max_prompt_tokens=200)
    prompts = Source(rows, encode, seed=0).all()
    assert len(prompts) == 4
    score = gym.get_score_answer_fn(rows[0]["dataset"])
    for prompt in prompts:
        assert prompt.text == prompt.row["question"] == prompt.row["entry"]["question"]
        assert prompt.row["entry"]["metadata"]["num_terms"] <= 3
        assert score(prompt.row["answer"], prompt.row["entry"]) == 1.0
        assert score("no", prompt.row["entry"]) < 1.0
        json.dumps(prompt.row)


def test_a_task_is_its_seed(gym: Any) -> None:
    def load(**options: Any) -> Any:
        return load_rows("reasoning-gym:chain_sum", **{"size": 4, "seed": 3, **options})

    rows, again, other = load(), load(), load(seed=4)
    # Read backwards: a question must not depend on those asked before.
    assert [again[i] for i in (3, 2, 1, 0)] == [rows[i] for i in (3, 2, 1, 0)]
    assert again.digest == rows.digest
    assert other[0] != rows[0]
    assert len({rows.digest, other.digest, load(size=5).digest, load(options={"max_terms": 3}).digest}) == 4


def test_bad_tasks(gym: Any) -> None:
    with pytest.raises(ValueError, match=r"no task 'chain_sums'; nearest: .*chain_sum"):
        load_rows("reasoning-gym:chain_sums", size=2)
    with pytest.raises(ValueError, match=r"does not take size=2 and options .*terms.*unexpected keyword"):
        load_rows("reasoning-gym:chain_sum", size=2, options={"terms": 3})
    with pytest.raises(ValueError, match="min_terms must be positive"):
        load_rows("reasoning-gym:chain_sum", size=2, options={"min_terms": -1})
    with pytest.raises(ValueError, match=r"'polynomial_multiplication' asks other questions in every process"):
        load_rows("reasoning-gym:polynomial_multiplication", size=2)
    assert set(gym.factory.DATASETS) >= UNREPEATABLE_TASKS
    with pytest.raises(ValueError, match="has no 'problem'; its fields are"):
        encode = PromptEncoder(tokenizer=TOKENIZER, max_prompt_tokens=9, prompt_key="problem")
        Source(load_rows("reasoning-gym:chain_sum", size=2), encode, seed=0)


@pytest.mark.parametrize(
    ("columns", "named"),
    [
        ({"images": [], "videos": None, "multi_modal_data": {"image": [], "audio": {}}, "image": ""}, None),
        ({"images": ["a.png"]}, "images"),
        ({"multi_modal_data": {"image": [], "video": [[], [b"x"]]}}, "multi_modal_data"),
        ({"audio": "a.wav"}, "audio"),
        ({"image": 0}, "image"),
    ],
)
def test_media_must_be_empty(columns: dict, named: str | None) -> None:
    """Columns of mixed datasets may be there; what is in them would be trained without."""
    from megatron_rl.data.media import refuse_media

    if named is None:
        refuse_media({"prompt": "q", **columns})
    else:
        with pytest.raises(ValueError, match=f"'{named}' is not empty, and only text is supported"):
            refuse_media({"prompt": "q", **columns})
