"""The planner: closed forms of what a rank holds, what is there for which config, and advice that is true."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_rl.cli import main
from megatron_rl.config.load import load_config
from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.models.hf_config import load_shape, num_parameters
from megatron_rl.planning.activations import Build, Pass, layer_bytes
from megatron_rl.planning.advice import advise, fullest_rank, with_options
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.memory import Case, footprint
from megatron_rl.planning.page import describe_plan, parse_memory
from megatron_rl.planning.parameters import buckets, model_parameters, trained_model
from megatron_rl.planning.schedule import longest_step, schedule
from tests.models import ascii_tokenizer, tiny_model

ROOT = Path(__file__).parents[2]
FAMILIES = [(family, tied) for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral") for tied in (False, True)]


@pytest.fixture(scope="module")
def sizing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("size_cluster", ROOT / "tools" / "size_cluster.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return tiny_model(directory, vocab_size=ascii_tokenizer(directory))


def config_file(directory: Path, path: Path, **sections: Any) -> Path:
    data = directory / "train.jsonl"
    data.write_text('{"prompt": "one", "answer": "1", "response": "1"}\n' * 16)
    tree = {
        "trainer": "grpo",
        "model": {"path": str(path), "dtype": "bfloat16"},
        "data": {"train": str(data), "max_prompt_tokens": 32},
        "train": {"steps": 1, "batch_size": 8, "max_tokens_per_micro_batch": 256},
        "rollout": {"engine": "hf", "max_new_tokens": 32, "group_size": 4},
        "run": {"dir": str(directory / "run")},
        **sections,
    }
    file = directory / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def case_of(directory: Path, path: Path, world: int = 4, *, critic: bool = False, **sections: Any) -> Case:
    config = load_config(config_file(directory, path, **sections))
    shape = load_shape(path)
    return Case(
        config=config,
        actor=shape,
        critic=shape.as_scalar() if critic else None,
        layout=Layout.of(config.parallel, world),
    )


def held(case: Case) -> dict[str, int]:
    return footprint(case, 0, 4).held


@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_parameters_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    path = tiny_model(tmp_path, family, tied=tied)
    assert model_parameters(load_shape(path)) == num_parameters(path)


def test_a_known_model_by_hand(sizing: ModuleType) -> None:
    """Qwen3-8B at tp 4, pp 2, dp 4: the sum written out, with padding to 16 rows a rank of the vocabulary."""
    shape = sizing.shape_of(sizing.MODELS["Qwen3-8B"])
    attention = 4096 * (8 + 2 * 2) * 128 + 8 * 128 * 4096 + 2 * 128
    layer = attention + 2 * 4096 + 3 * 4096 * 12288 // 4
    vocabulary = 37984 * 4096
    assert -(-151936 // 4) == 37984 and 37984 % 16 == 0
    first = 18 * layer + vocabulary
    bytes_ = trained_model(shape, Layout(tp=4, pp=2, dp=4), 0, 2)
    padding = bytes_.gradients // 4 - first
    assert 0 <= padding < 18 * 8 * 64 + 128
    assert bytes_.weights == 2 * (first + padding)
    assert bytes_.optimizer == 3 * 4 * (first + padding) // 4
    last = trained_model(shape, Layout(tp=4, pp=2, dp=4), 1, 2)
    assert 0 <= last.gradients // 4 - (first + 4096) < 18 * 8 * 64 + 128


def test_experts_have_optimizer_state_of_their_own(sizing: ModuleType) -> None:
    """Of 128 experts ep = 8 leaves 16 on a rank; 32 ranks at etp 1 hold 4 copies of each, and dp = 8 of the rest."""
    shape = sizing.shape_of(sizing.MODELS["Qwen3-30B-A3B"])
    layout = Layout(tp=4, dp=8, ep=8, sequence_parallel=True)
    dense, experts = buckets(shape, layout, 0)
    assert layout.expert_dp == experts.shared_by == 4 and dense.shared_by == 8
    assert experts.elements == 48 * 16 * 3 * 2048 * 768
    found = trained_model(shape, layout, 0, 2)
    assert found.optimizer == 12 * (dense.padded // 8 + experts.padded // 4)
    assert found.gathered == 4 * 37984 * 2048  # of one parameter at a time: rows of the vocabulary


@pytest.mark.parametrize(
    ("stage", "vpp", "micro_batches", "expected"),
    [(0, 1, 8, 4), (3, 1, 8, 1), (0, 1, 2, 2), (0, 2, 8, 11), (3, 2, 8, 5), (0, 2, 4, 8)],
)
def test_passes_in_flight(stage: int, vpp: int, micro_batches: int, expected: int) -> None:
    assert Layout(pp=4, vpp=vpp).in_flight(stage, micro_batches) == expected


def test_a_layer_by_hand(sizing: ModuleType) -> None:
    """Llama-3-70B at tp 8 with sequence parallelism, 1024 tokens: 34 T H / tp bytes and more in other papers' terms."""
    shape = sizing.shape_of(sizing.MODELS["Llama-3-70B"])
    layout = Layout(tp=8, sequence_parallel=True)
    at = Pass(shape=shape, layout=layout, build=Build.te, width=2, tokens=1024)
    norms = 2 * (2 * 2 * 128 * 8192 + 4 * 128)  # input and output of both
    attention = 2 * 1024 * 128 * 3 * (8 + 1) + 4 * 1024 * 8
    mlp = 3 * 2 * 1024 * 28672 // 8
    assert layer_bytes(at) == norms + attention + mlp
    more = replace(layout, sequence_parallel=False)
    assert layer_bytes(replace(at, layout=more)) == 8 * norms + attention + mlp


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({}, ()),
        ({"kl": {"where": "loss"}}, ("reference",)),
        ({"average": {"enabled": True}}, ("average of the weights", "model of the average")),
        ({"average": {"enabled": True, "offload": True}}, ("model of the average",)),
        ({"trainer": "sdpo"}, ("average of the weights", "teacher")),
        ({"trainer": "sdpo", "teacher": {"mode": "frozen"}}, ("teacher",)),
        ({"trainer": "sdpo", "teacher": {"mode": "live"}}, ()),
        ({"rollout": {"engine": "vllm_server", "max_new_tokens": 32}}, ("-engine",)),
        ({"trainer": "ppo"}, ("critic: weights", "critic: gradients", "critic: optimizer")),
        ({"trainer": "gad"}, ("critic: weights", "critic: gradients", "critic: optimizer")),
    ],
    ids=str,
)
def test_every_model_of_a_run_is_counted(tmp_path: Path, model: Path, sections: dict, parts: tuple[str, ...]) -> None:
    found = held(case_of(tmp_path, model, critic=sections.get("trainer") in ("ppo", "gad"), **sections))
    expected = {"weights", "gradients", "optimizer", *parts}
    assert set(found) == (expected - {"-engine"} if "-engine" in parts else expected | {"engine: weights"})


def test_sleep_takes_turns(tmp_path: Path, model: Path) -> None:
    """Awake, the engine is held; asleep it is there for its weights and for rollouts, which gradients are not."""
    engine = {"engine": "vllm", "max_new_tokens": 32, "vllm": {"kv_cache_gb": 1.0}}
    awake = footprint(case_of(tmp_path, model, rollout=engine), 0, 4)
    engine["vllm"] = {"kv_cache_gb": 1.0, "sleep": True}
    asleep = footprint(case_of(tmp_path, model, rollout=engine), 0, 4)
    kept = awake.held["engine: weights"] + awake.held["engine: keys and values"]
    assert awake.held["engine: keys and values"] == 2**30
    assert awake.between_steps - asleep.between_steps == kept
    assert asleep.at("rollouts") == asleep.held["weights"] + kept
    assert asleep.at("update, the loss") == awake.at("update, the loss") - kept
    assert asleep.host["whoever sleeps"] == max(asleep.held["optimizer"], awake.held["engine: weights"])


def test_what_the_schedule_says(tmp_path: Path, model: Path) -> None:
    case = case_of(tmp_path, model, parallel={"pp": 2})
    cut = schedule(case.config, case.layout, longest_step(case.config))
    assert (cut.updates, cut.samples, cut.micro_batches, cut.tokens) == (1, 32, 4, (256, 256))
    assert cut.bubble == pytest.approx(1 / 5)


def test_advice_is_what_the_planner_says_of_the_changed_config(tmp_path: Path, model: Path) -> None:
    case = case_of(tmp_path, model, model={"path": str(model), "dtype": "float32"})
    lengths = longest_step(case.config)
    before = fullest_rank(case, lengths).peak
    each, together = advise(case, lengths, before // 3)
    assert {"parallel.recompute=true", "model.dtype=bfloat16"} <= {str(advice) for advice in each}
    assert [advice.peak for advice in each] == sorted(advice.peak for advice in each)
    for advice in each:
        changed = with_options(case, advice.options)
        assert changed is not None and fullest_rank(changed, lengths).peak == advice.peak < before
    assert together is not None and together.peak <= before // 3
    changed = with_options(case, together.options)
    assert changed is not None and fullest_rank(changed, lengths).peak == together.peak
    assert advise(case, lengths, 1000)[1] is None


def test_the_page_names_the_worst_and_a_way_out(tmp_path: Path, model: Path) -> None:
    case = case_of(tmp_path, model)
    lengths = longest_step(case.config)
    peak = fullest_rank(case, lengths).peak
    text, fits = describe_plan(case, lengths, peak * 2)
    assert fits and "fits" in text and "to change" not in text
    text, fits = describe_plan(case, lengths, peak)
    assert not fits and "parallel.recompute=true  takes off" in text
    text, _ = describe_plan(case_of(tmp_path, model, parallel={"pp": 2}), lengths, peak)
    assert "stage 0: peak" in text and "stage 1: peak" in text


@pytest.mark.parametrize(("text", "size"), [("80GB", 80 * 10**9), ("1.5GiB", 3 * 2**29), ("40 MB", 40 * 10**6)])
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "-1GB", "80 TB", "lots"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="as 80GB"):
        parse_memory(text)


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ({"tp": 2}, 3, "do not fit 3 GPUs: give a multiple of 2"),
        ({"tp": 2, "dp": 2}, 8, "parallel.dp=null"),
        ({"ep": 4}, 2, "parallel.ep=4 times parallel.etp=1 does not divide the 2 GPUs"),
    ],
)
def test_layouts_that_do_not_fit_the_gpus(options: dict, world: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout.of(ParallelConfig(**options), world)


def test_check_plans_and_says_by_its_exit_code(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(config_file(tmp_path, model, reward={"name": "exact"}))
    assert main(["check", path, "--gpus", "4", "--memory", "80GB", "parallel.tp=2"]) == 0
    shown = capsys.readouterr().out
    assert "tp=2 pp=1 vpp=1 dp=2: 4 process(es)" in shown and "held between steps" in shown and "fits" in shown
    assert main(["check", path, "parallel.tp=2", "--gpus", "4", "--memory", "1MB"]) == 1
    assert "does not fit" in capsys.readouterr().out
    for wrong in (["--gpus", "3", "parallel.tp=2"], ["--memory", "80GB"], ["--gpus", "4", "--memory", "much"]):
        assert main(["check", path, *wrong]) == 2
        assert capsys.readouterr().err.startswith("megatron-rl: ")
    with pytest.raises(SystemExit, match="2"):
        main(["check", path, "--gpu", "four"])
    assert main(["check", path]) == 0
    assert "held between steps" not in capsys.readouterr().out


def test_the_cluster_guide_has_the_planners_tables(sizing: ModuleType) -> None:
    """`python tools/size_cluster.py` writes them."""
    page = sizing.PAGE.read_text()
    assert sizing.written(page) == page
