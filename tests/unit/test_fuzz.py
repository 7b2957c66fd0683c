"""Whatever a user writes is accepted, or refused in a message of our own: never a library's traceback, never a hang.

Every case counts, and each test asserts its share of `CASES`, which add up to more than 2,000. Examples are the same in
every run.
"""

import json
import random
import re
import shutil
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_rl.checkpoint.hf import SafetensorsReader
from megatron_rl.cli import main
from megatron_rl.config.load import load, options_of
from megatron_rl.config.schema import SCHEMAS
from megatron_rl.data.sources import ExampleEncoder, PromptEncoder, Source, load_rows
from megatron_rl.data.tokenizer import load_tokenizer, read_generation_eos
from megatron_rl.models.hf_config import load_shape, tensor_shapes
from megatron_rl.models.hf_map import WeightMap
from megatron_rl.rewards import REWARDS
from megatron_rl.rewards.loading import load_reward
from megatron_rl.trainers.correction import read_criteria
from tests.models import ascii_tokenizer, tiny_model, tiny_tokenizer

CASES = {
    "every option": 2 * sum(len(list(options_of(schema))) for schema in SCHEMAS.values()),
    "overrides": 250,
    "sections": 150,
    "texts": 350,
    "bases": 50,
    "criteria": 100,
    "jsonl": 400,
    "bytes": 250,
    "parquet": 150,
    "rewards": 200,
    "model config": 200,
    "tokenizer": 80,
    "safetensors": 200,
}
PACKAGE = str(Path(__file__).parents[2] / "megatron_rl")
SECONDS = 20  # for one case, on a machine however busy; they take milliseconds

MINIMAL = """
trainer: {trainer}
model: {{path: model}}
data: {{train: train.jsonl}}
train: {{steps: 3, batch_size: 4}}
run: {{dir: out}}
"""

# It trains nothing.
MINIMAL_EVALUATION = """
trainer: eval
model: {path: model}
data: {val: test.jsonl}
run: {dir: out}
"""

# What people and their editors leave behind, beside what hypothesis thinks of.
SCALARS = [
    *(
        "1",
        "-1",
        "0",
        "-0.0",
        "1.5",
        "1e3",
        "1e400",
        "nan",
        ".nan",
        "inf",
        "-.inf",
        "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
    ),
    *("null", "~", "", "true", "No", "''", "'x'", '"', "abc", "é", "\u2028", "\U0001f600", "\x00", "\ud800", "???"),
    *("[]", "[1, 2]", "{}", "{a: 1}", "{a: {b: [1]}}", "{1: 2}", "{null: 1}", "{a: ???}", "[", "{", "a: b", "- a"),
    *("${optim.lr}", "${nope}", "${", "${}", "${.lr}", "${..train.steps}", "${model}", "${oc.env:NOT_SET_ANYWHERE}"),
    *("${oc.create:{a: 1}}", "${oc.decode:'1'}", "${" * 99 + "x" + "}" * 99, "&a 1", "*a", "&a [*a]", "=", "<<", "#"),
    *("2026-01-01", "!!binary aGk=", "!!int x", "!!bool x", "!!timestamp x", "!!float x", "!foo x", "!!set {a}"),
    *("!!python/object/apply:os.system [false]", "[" * 60 + "]" * 60, "[" * 5000, "1:30", "%", "@x", "`x`", "|", "> x"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=6), values, max_size=4),
    max_leaves=8,
)


class Tally(Counter[str]):
    """How many cases were accepted and refused."""

    def attempt(self, case: Callable[[], object], names: str = "") -> None:
        """Runs a case; a refusal must be raised by this package, in words, and say `names`."""
        try:
            with at_most(SECONDS):
                case()
        except ValueError as error:
            message = " ".join(str(error).split())
            assert traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE), repr(error)
            assert len(message) > 15 and names in message, message
            self["refused"] += 1
        else:
            self["accepted"] += 1


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(name: str, check: Callable[..., None], *drawn: st.SearchStrategy, **named: st.SearchStrategy) -> Tally:
    """`check(tally, ...)` on as many examples as `CASES` says, and the tally."""
    tally = Tally()

    @settings(
        max_examples=CASES[name],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*drawn), st.fixed_dictionaries(named))
    def examples(arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        check(tally, *arguments, **options)

    examples()
    assert tally.total() >= CASES[name], tally
    return tally


def test_the_cases_are_enough() -> None:
    assert sum(CASES.values()) >= 2000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for each trainer, a model of each family, and two tokenizers: with a chat template and without."""
    folder = tmp_path_factory.mktemp("fuzz")
    for trainer in SCHEMAS:
        text = MINIMAL_EVALUATION if trainer == "eval" else MINIMAL.format(trainer=trainer)
        (folder / f"{trainer}.yaml").write_text(text)
    for family in ("llama", "qwen2", "qwen3"):
        tiny_tokenizer(tiny_model(folder / family, family), 99)
    ascii_tokenizer(folder / "chat")
    return folder


# Configs


@pytest.mark.parametrize("trainer", SCHEMAS)
def test_every_option_with_any_value(folder: Path, trainer: str) -> None:
    tally = Tally()
    for option in options_of(SCHEMAS[trainer]):
        for value in random.Random(f"{trainer} {option}").sample(SCALARS, 2):
            tally.attempt(partial(load, folder / f"{trainer}.yaml", [f"{option}={value}"]))
    assert tally.total() == 2 * len(list(options_of(SCHEMAS[trainer])))
    assert min(tally["accepted"], tally["refused"]) > tally.total() / 30, tally


OPTIONS = {trainer: list(options_of(schema)) for trainer, schema in SCHEMAS.items()}
SECTIONS = sorted({option.split(".")[0] for option in OPTIONS["grpo"]})
KEYS = st.sampled_from(
    [*OPTIONS["grpo"], *OPTIONS["sft"], *SECTIONS, "base", "data.task.a.b", "optim[lr]", "a..b", "."]
)


def test_overrides(folder: Path) -> None:
    override = st.builds("{}={}".format, KEYS, st.sampled_from(SCALARS) | st.text(max_size=8) | st.floats())

    def check(tally: Tally, trainer: str, overrides: list[str]) -> None:
        tally.attempt(lambda: load(folder / f"{trainer}.yaml", overrides))

    drawn = st.lists(override | st.text(max_size=8), max_size=3)
    tally = run("overrides", check, st.sampled_from(sorted(SCHEMAS)), drawn)
    assert tally["accepted"] > 0 and tally["refused"] > 100, tally


def test_sections_of_any_shape(folder: Path) -> None:
    """A valid file into which options and sections of any type are written, alone and together."""
    written = st.dictionaries(KEYS, JSON | st.sampled_from([1, 2, 0.5, True, "none"]), max_size=3)

    def check(tally: Tally, trainer: str, changes: dict[str, Any]) -> None:
        config = yaml.safe_load((folder / f"{trainer}.yaml").read_text())
        for key, value in changes.items():
            section, _, name = key.partition(".")
            if name and isinstance(config.get(section, {}), dict):
                config.setdefault(section, {})[name] = value
            else:
                config[section] = value
        (folder / "sections.yaml").write_text(yaml.safe_dump(config))
        tally.attempt(lambda: load(folder / "sections.yaml"))

    tally = run("sections", check, st.sampled_from(sorted(SCHEMAS)), written)
    assert min(tally["accepted"], tally["refused"]) > 5, tally


def test_files_of_any_text(folder: Path) -> None:
    line = st.builds("{}: {}\n".format, st.sampled_from([*SECTIONS, "trainer", "base"]), st.sampled_from(SCALARS))
    text = (
        st.text(alphabet="ab:-[]{}&*!%@`'\"#|> \n\t,?=.0${}\x00\ufeff", max_size=30)
        | st.lists(line, min_size=1, max_size=4).map("".join)
        | st.sampled_from([*SCALARS, "[" * 200_000, "{a: " * 50_000, "- " * 5000, "a: 1\na: 2", "---\n---"])
        | st.sampled_from(SCALARS).map((MINIMAL.format(trainer="grpo") + "reward: ").__add__)
    )
    content = text.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=20)

    def check(tally: Tally, content: bytes) -> None:
        (folder / "text.yaml").write_bytes(content)
        tally.attempt(lambda: load(folder / "text.yaml"))

    assert run("texts", check, content)["refused"] > 300


def test_bases(folder: Path) -> None:
    names = [
        "grpo.yaml",
        "sft.yaml",
        "a.yaml",
        "b.yaml",
        "none.yaml",
        ".",
        "/",
        "..",
        "",
        "x" * 500,
        "a\0",
        "~",
        "${x}",
    ]
    base = st.sampled_from(names) | JSON

    def check(tally: Tally, first: Any, second: Any) -> None:
        (folder / "a.yaml").write_text(yaml.safe_dump({"base": first}))
        (folder / "b.yaml").write_text(yaml.safe_dump({"base": second}))
        tally.attempt(lambda: load(folder / "a.yaml"))

    assert run("bases", check, base, base)["refused"] > 30


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "nan", "1e400"])
def test_numbers_that_are_none_are_refused_by_name(folder: Path, number: str) -> None:
    tried = 0
    defaults = load(folder / "grpo.yaml").config
    for key in OPTIONS["grpo"]:
        if isinstance(attrgetter(key)(defaults), float):
            tried += 1
            with pytest.raises(ValueError, match=re.escape(key)):
                load(folder / "grpo.yaml", [f"{key}={number}"])
    assert tried > 20


@pytest.mark.parametrize("value", ["true", "1.0", "1e3", "1.5", "null", str(2**63), str(-(2**63))])
def test_whole_numbers_are_whole(folder: Path, value: str) -> None:
    """Nothing is rounded, and `true` is not 1."""
    with pytest.raises(ValueError, match=r"train\.steps"):
        load(folder / "grpo.yaml", [f"train.steps={value}"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["parallel.dp=70000"], r"dp=70000 is more than 65536 ranks"),
        (["train.batch_size=1000000"], r"train.batch_size=1000000 with 8 responses .* more than 1048576 sequences"),
        (["optim.beta2=1"], r"optim.beta2=1.0 must be at least 0 and below 1"),
        (["optim.lr=???"], r"optim.lr is left open"),
        (["train.seed=-1"], r"train.seed=-1 must not be negative"),
        (["algorithm.clip_low=-0.1"], r"algorithm.clip_low=-0.1 must not be negative"),
        (["eval.limit=0"], r"eval.limit=0 must be greater than 0"),
        (["data.task=[1]"], r"override 'data.task=\[1\]': .*incompatible"),
    ],
)
def test_slips_are_named(folder: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder / "grpo.yaml", overrides)


def test_rejection_criteria() -> None:
    names = (
        st.sampled_from(["seq_mean_k3", "token_k1", "seq_max_k1", "seq_sum_k2"]) | st.text(max_size=5) | st.integers()
    )
    bounds = st.floats(0.1, 9) | st.floats() | st.lists(JSON | st.floats(0.1, 9), max_size=3) | JSON

    def check(tally: Tally, reject: dict[Any, Any]) -> None:
        tally.attempt(lambda: read_criteria(reject), "rollout_correction.reject")

    tally = run("criteria", check, st.dictionaries(names, bounds, min_size=1, max_size=2))
    assert tally["accepted"] and tally["refused"] > 50, tally


# Data

MESSAGE = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "", None, 1]),
        "content": st.text(max_size=8) | JSON,
        "tool_calls": JSON,
    },
)
PROMPT = st.text(max_size=30) | st.lists(MESSAGE, max_size=3) | JSON
TURN = st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9)})
GOOD = st.fixed_dictionaries({"prompt": st.text("abc ", min_size=1) | st.lists(TURN, min_size=1, max_size=2)})
GOOD_EXAMPLE = st.builds(dict.__or__, GOOD, st.fixed_dictionaries({"response": st.text(max_size=9)}))
ROW = st.fixed_dictionaries(
    {}, optional={"prompt": PROMPT, "response": PROMPT, "answer": JSON, "images": JSON, "videos": JSON, "extra": JSON}
)
READING = {
    "chat": st.sampled_from(["auto", "always", "never"]),
    "truncation_side": st.sampled_from(["left", "right", "error"]),
    "max_prompt_tokens": st.integers(1, 40),
}


@pytest.fixture(scope="module")
def tokenizers(folder: Path) -> dict[str, Any]:
    return {"chat": load_tokenizer(folder / "chat"), "plain": load_tokenizer(folder / "llama")}


def draw(path: Path, tokenizer: Any, examples: bool, **reading: Any) -> None:
    prompt = PromptEncoder(tokenizer=tokenizer, **({"max_prompt_tokens": 20} | reading))
    encoder: Any = ExampleEncoder(prompt=prompt) if examples else prompt
    Source(load_rows(path), encoder, seed=1).next(5)


def test_jsonl(folder: Path, tokenizers: dict[str, Any]) -> None:
    path = folder / "rows.jsonl"
    ends = st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\x0b\n", "", "\x0c"])
    rows = st.lists(GOOD_EXAMPLE, min_size=1, max_size=3) | st.lists(ROW | GOOD | JSON, max_size=3)

    def check(tally: Tally, rows: list, end: str, kind: str, examples: bool, **reading: Any) -> None:
        path.write_text(end.join(map(json.dumps, rows)))
        tally.attempt(lambda: draw(path, tokenizers[kind], examples, **reading), "rows.jsonl")

    kinds = st.sampled_from(["chat", "plain"])
    tally = run("jsonl", check, rows=rows, end=ends, kind=kinds, examples=st.booleans(), **READING)
    assert min(tally["accepted"], tally["refused"]) > 60, tally


def test_jsonl_of_any_bytes(folder: Path, tokenizers: dict[str, Any]) -> None:
    path = folder / "bytes.jsonl"
    start = st.sampled_from([b"", b'{"prompt": "a"}\n', b'\xef\xbb\xbf{"prompt": "a"}\r\n', b'\xff\xfe{\x00"\x00'])
    ends = [
        *(b"", b'{"prompt": "b"', b'{"prompt": "\\ud800"}', b'{"prompt": "\\u0000"}', b'{"prompt": "a", "prompt": 3}'),
        *(b'{"prompt": NaN}', b'{"prompt": ' + b"[" * 100_000, b'{"images": ' + b"[" * 900 + b"]" * 900 + b"}"),
        *(b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "' + b"x" * 300_000 + b'"}', b'{"prompt": "\xff"}'),
    ]
    content = st.builds(b"".join, st.tuples(start, st.binary(max_size=8), st.sampled_from(ends)))

    def check(tally: Tally, content: bytes) -> None:
        path.write_bytes(content)
        tally.attempt(lambda: draw(path, tokenizers["plain"], examples=False), "bytes.jsonl")

    assert run("bytes", check, content)["refused"] > 150


def test_parquet(folder: Path, tokenizers: dict[str, Any]) -> None:
    """Rows of every shape that parquet can hold, whole, damaged and cut off."""
    path = folder / "rows.parquet"
    flips = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=3)

    def check(tally: Tally, rows: list, examples: bool, flips: list[tuple[float, int]], keep: float) -> None:
        try:
            table = pyarrow.Table.from_pylist(rows)
        except (pyarrow.ArrowException, OverflowError):
            table = pyarrow.table({"prompt": [0.5, None]})  # rows that parquet has no columns for
        path.unlink(missing_ok=True)  # the last one may still be mapped
        try:
            pyarrow.parquet.write_table(table, path)
        except pyarrow.ArrowException:  # an object without fields
            path.write_bytes(b"PAR1")
        content = bytearray(path.read_bytes())
        for place, bit in flips:
            content[int(place * len(content))] ^= 1 << bit
        path.unlink()
        path.write_bytes(content[: max(1, int(keep * len(content)))])
        tally.attempt(lambda: draw(path, tokenizers["plain"], examples), "rows.parquet")

    keep = st.sampled_from([1, 1, 1, 0.9, 0.5, 0]) | st.floats(0, 1)
    rows = st.lists(GOOD_EXAMPLE | ROW, min_size=1, max_size=3)
    tally = run("parquet", check, rows, st.booleans(), flips, keep)
    assert tally["accepted"] and tally["refused"] > 80, tally


def test_columns_of_one_name(folder: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, folder / "twice.parquet")
    with pytest.raises(
        ValueError, match=r"twice\.parquet is not a parquet file: Multiple matches for FieldRef.Name\(prompt\)"
    ):
        load_rows(folder / "twice.parquet")


@pytest.mark.parametrize("size", ["7", 0, True, None, 2.0, 10**12])
def test_tasks_have_a_size(size: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.task\.size"):
        load_rows("reasoning-gym:chain_sum", size=size)


@pytest.mark.parametrize("options", [{"min_terms": "x"}, {"min_terms": [1]}, {1: 2}, {"nope": 1}, {"min_terms": b"x"}])
def test_options_of_tasks(options: dict) -> None:
    with pytest.raises(ValueError, match=r"reasoning-gym:chain_sum does not take size=2 and options"):
        load_rows("reasoning-gym:chain_sum", size=2, options=options)


def test_rewards() -> None:
    """Options of the built-in rewards, checked as a worker checks them; other names end in a ValueError, too."""
    known = ["answer_key", "tolerance", "pattern", "format_weight", "tag", "prompt", "rollout", "self", "x"]
    value = JSON | st.sampled_from(["(", "a{99999999999}", "(" * 5000 + ")" * 5000, "(?P<answer>a)", 0.5, 1])
    options = st.dictionaries(st.sampled_from(known), value, max_size=3)
    names = sorted(set(REWARDS) - {"reasoning"})  # which imports its library first
    others = [
        ":",
        "a:",
        ":f",
        ".:f",
        "os:nope",
        "none.py:f",
        ".py:f",
        "a\0.py:f",
        "os.path:sep",
        "exakt",
        "",
        "\ud800:f",
    ]

    def check(tally: Tally, name: str, options: dict[str, Any]) -> None:
        tally.attempt(lambda: load_reward(name, options))

    tally = run("rewards", check, st.sampled_from(names * 4 + others), options)
    assert tally["accepted"] > 5 and tally["refused"] > 100, tally


# Models


def look_at(directory: Path) -> None:
    """What the preflight asks of a model directory."""
    shape = load_shape(directory)
    reader = SafetensorsReader(directory)
    reader.check(WeightMap(shape.family.rules, num_layers=shape.num_layers, tied=shape.tied).hf_names())
    reader.check_shapes(tensor_shapes(directory))
    load_tokenizer(directory)
    read_generation_eos(directory)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder / "llama", tmp_path / "copy")


def test_model_configs(folder: Path, tmp_path: Path) -> None:
    families = ["llama", "qwen2", "qwen3"]
    held = {family: json.loads((folder / family / "config.json").read_text()) for family in families}
    copies = {family: shutil.copytree(folder / family, tmp_path / family) for family in families}
    names = [
        *held["qwen3"],
        *("head_dim", "rope_scaling", "rope_theta", "auto_map", "quantization_config", "num_labels"),
    ]
    names += [
        "layer_types",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "id2label",
        "text_config",
        "use_return_dict",
    ]
    values = st.sampled_from([None, 0, -1, 1, 3, 64, 1.5, 2**31, 10**30, "", "silu", "llama", True, ["full_attention"]])
    rope = st.fixed_dictionaries(
        {},
        optional={"rope_type": st.sampled_from(["default", "llama3", "yarn", 3]), "rope_theta": JSON, "factor": JSON},
    )
    gone = st.just("<gone>")

    def check(tally: Tally, family: str, changes: dict[str, Any], text: str | None) -> None:
        config = json.dumps({name: value for name, value in (held[family] | changes).items() if value != "<gone>"})
        (copies[family] / "config.json").write_text(config if text is None else text)
        tally.attempt(lambda: look_at(copies[family]))

    changes = st.dictionaries(st.sampled_from(names), values | rope | gone | JSON, min_size=1, max_size=2)
    text = st.none() | st.sampled_from(["", "{", "[]", "1", "null", "{}", "\x00", "[" * 99_999, '{"model_type": [1]}'])
    tally = run("model config", check, st.sampled_from(families), changes, st.none() | st.none() | text)
    assert min(tally["accepted"], tally["refused"]) > 20, tally


def test_tokenizers(copy: Path) -> None:
    """Every file beside the weights, damaged or of another shape."""
    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"]
    kept = {name: (copy / name).read_bytes() for name in files if (copy / name).exists()}
    fields = [
        "eos_token",
        "tokenizer_class",
        "auto_map",
        "chat_template",
        "added_tokens_decoder",
        "model",
        "eos_token_id",
    ]
    other = st.dictionaries(st.sampled_from(fields), JSON, max_size=2).map(lambda fields: json.dumps(fields).encode())
    flip = st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255))

    def check(tally: Tally, name: str, content: bytes, merge: bool, flip: tuple[float, int]) -> None:
        old = kept.get(name, b"{}")
        if merge:
            content = json.dumps(json.loads(old) | json.loads(content)).encode()
        elif content == b"{}":
            place = int(flip[0] * len(old))
            content = old[:place] + bytes([flip[1]]) + old[place + 1 :]
        (copy / name).write_bytes(content)
        tally.attempt(lambda: look_at(copy), str(copy))
        if name in kept:
            (copy / name).write_bytes(kept[name])
        else:
            (copy / name).unlink()

    tally = run("tokenizer", check, st.sampled_from(files), other, st.booleans(), flip)
    assert min(tally["accepted"], tally["refused"]) > 10, tally


def test_safetensors(copy: Path) -> None:
    """Headers cut off, flipped, lengthened and random, with an index and without."""
    path, index = copy / "model.safetensors", copy / "model.safetensors.index.json"
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    edits = st.lists(st.tuples(st.integers(0, header - 1), st.integers(0, 255)), max_size=3)
    names = json.loads(good[8:header])
    whole = {"weight_map": dict.fromkeys(names.keys() - {"__metadata__"}, path.name)}
    files = st.sampled_from(["../model.safetensors", "/etc/passwd", "config.json", "", "none.safetensors", 3, None])
    indices = (
        st.just(whole)
        | JSON
        | st.builds(lambda file: {"weight_map": whole["weight_map"] | {"model.norm.weight": file}}, files)
        | st.just({"weight_map": {"other": path.name, **whole["weight_map"]}})
    )

    def check(tally: Tally, edits: list[tuple[int, int]], stop: int | None, held: Any) -> None:
        content = bytearray(good)
        for place, value in edits:
            content[place] = value
        path.unlink()  # the last one may still be mapped
        path.write_bytes(content[:stop])
        index.unlink(missing_ok=True)
        if held != "none":
            index.write_text(json.dumps(held))
        tally.attempt(lambda: look_at(copy), str(copy))

    stop = st.none() | st.integers(0, header + 9) | st.just(len(good) - 1)
    tally = run("safetensors", check, edits, stop, st.just("none") | st.just("none") | indices)
    assert tally["accepted"] and tally["refused"] > 100, tally


# From the command line


ENDS = [
    *(["optim.lr=.nan"], ["rollout.temperature=inf"], ["reward.options={tolerance: x}"], ["reward.name=numeric"]),
    *(["reward.name=numeric", "reward.options={tolerance: .nan}"], ["data.prompt_key=[a]"], ["model.path=/"]),
    *(
        ["data.train=rows"],
        ["data.train=."],
        ["data.train=reasoning-gym:", "data.task={size: 3}"],
        ["data.val=x.parquet"],
    ),
    *(["rollout_correction.reject={seq_mean_k3: -1}"], ["parallel.tp=64"], ["parallel.pp=64"], ["model.weights=/"]),
    *(["train.max_tokens_per_micro_batch=1"], ["reward.name=" + "x" * 5000], ["data.train=" + "x" * 5000 + ".jsonl"]),
]


@pytest.mark.parametrize("overrides", ENDS, ids=lambda overrides: " ".join(overrides)[:60])
def test_the_command_says_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, overrides: list[str]
) -> None:
    """The whole way, with a reward pool where it comes that far."""
    monkeypatch.chdir(folder)
    (folder / "train.jsonl").write_text('{"prompt": "w5", "answer": "1"}\n')
    with at_most(120):
        code = main(["check", "grpo.yaml", "model.path=llama", *overrides])
    err = capfd.readouterr().err
    if code:
        assert code == 2 and err.count("\n") == 1 and err.startswith("megatron-rl: "), err
    assert bool(code) == (overrides != ["reward.name=numeric"])
