"""Who comes from the reference implementation of SDPO finds every option again, and none of its well-known errors."""

import dataclasses
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import megatron_rl
from megatron_rl.config.load import load_config
from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import SCHEMAS, TruncationSide
from megatron_rl.data.collate import collate, scatter_back
from megatron_rl.data.planner import plan_step
from megatron_rl.data.samples import from_example
from megatron_rl.data.sources import PromptEncoder, Source, load_rows
from megatron_rl.data.tokenizer import load_tokenizer
from tests.models import tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "sdpo.md").read_text(encoding="utf-8")
KEY = re.compile(r"`(\w+(?:\.\w+)+)(?:: [^`]*)?`")
# Fields of its self-distillation section.
REFERENCE_KEYS = {
    "full_logit_distillation",
    "distillation_topk",
    "distillation_add_tail",
    "alpha",
    "is_clip",
    "teacher_regularization",
    "teacher_update_rate",
    "success_reward_threshold",
    "dont_reprompt_on_self_success",
    "remove_thinking_from_demonstration",
    "include_environment_feedback",
    "environment_feedback_only_without_solution",
    "max_reprompt_len",
    "reprompt_truncation",
    "reprompt_template",
    "solution_template",
    "feedback_template",
}


def migration() -> list[tuple[str, str]]:
    """(there, here) of the rows of the page's table."""
    section = PAGE.partition("## Coming from the reference implementation")[2].partition("\n\nThere the YAML")[0]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in section.splitlines() if line.startswith("| `")]
    assert all(len(row) == 2 for row in cells), cells
    return [(there.strip(), here.strip()) for there, here in cells]


def options(schema: type, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for item in dataclasses.fields(schema):
        nested = dataclasses.is_dataclass(item.type)
        found |= options(item.type, f"{prefix}{item.name}.") if nested else {prefix + item.name}
    return found


def test_every_option_of_the_reference_has_a_row() -> None:
    named = {name for there, _ in migration() for name in re.findall(r"`(\w+)", there)}
    assert REFERENCE_KEYS - named == set()
    assert [there for there, here in migration() if not KEY.search(here)] == []


def test_every_option_of_the_page_exists() -> None:
    if "sdpo" not in SCHEMAS:
        pytest.skip("trainer 'sdpo' is not in SCHEMAS")
    of_table = {key for _, here in migration() for key in KEY.findall(here)}
    of_page = {key for key in KEY.findall(PAGE) if key.startswith(("distill.", "teacher.", "reprompt."))}
    assert len(of_table) > 20 and (of_table | of_page) - options(SCHEMAS["sdpo"]) == set()


def test_every_option_is_on_the_page() -> None:
    if "sdpo" not in SCHEMAS:
        pytest.skip("trainer 'sdpo' is not in SCHEMAS")
    own = {key for key in options(SCHEMAS["sdpo"]) if key.startswith(("distill.", "teacher.", "reprompt."))}
    names = set(re.findall(r"\w+", PAGE))
    assert {key for key in own if key.partition(".")[2] not in names} == set()


# The five errors.


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    row = {
        "prompt": "w5 w6 w7",
        "images": [],
        "videos": None,
        "multi_modal_data": {"image": [], "video": []},
        "multi_modal_inputs": {},
    }
    path.write_text(json.dumps(row) + "\n")
    return path


def write_config(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(
        "trainer: grpo\nmodel: {path: m}\ntrain: {steps: 1, batch_size: 2}\nrun: {dir: r}\n"
        f"data: {{train: rows.jsonl, truncation_side: error}}\n{text}"
    )
    return path


def test_a_truncation_side_of_error_never_reaches_transformers(tmp_path: Path, rows: Path) -> None:
    tiny_tokenizer(tmp_path, 99)
    tokenizer = load_tokenizer(tmp_path)
    # What goes wrong there.
    with pytest.raises(ValueError, match="Truncation side should be"):
        type(tokenizer).from_pretrained(tmp_path, truncation_side="error")

    side = load_config(write_config(tmp_path)).data.truncation_side
    assert side is TruncationSide.error
    before = tokenizer.truncation_side
    encode = PromptEncoder(tokenizer=tokenizer, max_prompt_tokens=3, truncation_side=side.value)
    assert len(Source(load_rows(rows), encode, seed=0).next(1)[0].token_ids) == 3
    short = dataclasses.replace(encode, max_prompt_tokens=2)
    with pytest.raises(ValueError, match=r"the prompt has 3 tokens, more than data\.max_prompt_tokens=2"):
        Source(load_rows(rows), short, seed=0).next(1)
    assert tokenizer.truncation_side == before in ("left", "right")


def test_teacher_and_student_are_packed_without_padding() -> None:
    """The prompts differ in length, the packing too, and every response token finds its own in the other pass."""
    responses = [[11, 12, 13], [21], [31, 32]]
    student = [from_example(n, [1] * (2 + n), response) for n, response in enumerate(responses)]
    teacher = [from_example(n, [2] * (9 - 3 * n), response) for n, response in enumerate(responses)]
    found = []
    for samples in (student, teacher):
        plan = plan_step([len(sample) for sample in samples], dp_size=1, max_tokens=12)
        batches = [collate([samples[i] for i in m], field_names=()) for m in plan.micro_batches[0]]
        assert sum(batch.tokens.shape[1] for batch in batches) == sum(map(len, samples))
        labels: dict[int, torch.Tensor] = {}
        for batch in batches:
            # What the hidden state at a loss position predicts is the token after it.
            assert torch.equal(batch.tokens[0, batch.loss_positions + 1], batch.labels)
            labels |= scatter_back(batch.labels, batch)
        found.append(([batch.sample_ids for batch in batches], {n: x.tolist() for n, x in labels.items()}))
    (student_packs, student_labels), (teacher_packs, teacher_labels) = found
    assert student_packs != teacher_packs
    assert student_labels == teacher_labels == dict(enumerate(responses))


def test_empty_media_are_accepted(tmp_path: Path, rows: Path) -> None:
    tiny_tokenizer(tmp_path, 99)
    encode = PromptEncoder(tokenizer=load_tokenizer(tmp_path), max_prompt_tokens=3)
    (prompt,) = Source(load_rows(rows), encode, seed=0).all()
    assert prompt.text == "w5 w6 w7" and prompt.row["multi_modal_inputs"] == {}
    row = json.loads(rows.read_text())
    rows.write_text(json.dumps(row | {"multi_modal_inputs": {"pixel_values": [0.5]}}) + "\n")
    with pytest.raises(ValueError, match=r"line 1: 'multi_modal_inputs' is not empty, and only text is supported"):
        Source(load_rows(rows), encode, seed=0).all()


def test_every_module_can_be_imported() -> None:
    names = sorted(item.name for item in pkgutil.walk_packages(megatron_rl.__path__, "megatron_rl."))
    assert len(names) > 80 and "megatron_rl.data.reprompt" in names
    for name in names:
        importlib.import_module(name)


@pytest.mark.parametrize(
    ("trainer", "key", "hint"),
    [
        ("grpo", "rollout_correction.hihg", "did you mean 'rollout_correction.high'"),
        ("grpo", "actor.use_remove_padding", ""),
        ("sdpo", "teacher.ema_update_rate", "did you mean 'teacher."),
        ("sdpo", "distill.top_k", "did you mean 'distill.topk'"),
        ("sdpo", "actor.self_distillation.alpha", ""),
    ],
)
def test_a_key_that_is_none_is_refused_by_name(tmp_path: Path, trainer: str, key: str, hint: str) -> None:
    if trainer not in SCHEMAS:
        pytest.skip(f"trainer {trainer!r} is not in SCHEMAS")
    path = write_config(tmp_path)
    path.write_text(path.read_text().replace("trainer: grpo", f"trainer: {trainer}"))
    load_config(path)
    section = key.partition(".")[0]
    with pytest.raises(ConfigError) as refused:
        load_config(path, [f"{key}=1"])
    assert str(refused.value).startswith(f"unknown key '{section}") and hint in str(refused.value)
