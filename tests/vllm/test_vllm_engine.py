"""vLLM in the trainer's processes: the trainer's log-probabilities through ten updates; faults are found."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.pool import Pool
from tests.dist.test_engine import PROMPTS, sampling
from tests.dist.test_worker import make_worker, update
from tests.loop.test_trainers import steps, train
from tests.models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")

# Heads that vLLM has an attention kernel for on a CPU.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
FAMILIES = {"llama": False, "qwen2": True, "qwen3": True, "qwen3_moe": False}  # and whether the output layer is tied


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for family, tied in FAMILIES.items():
        sizes = SIZES | ({"moe_intermediate_size": 64} if family == "qwen3_moe" else {})
        tiny_tokenizer(tiny_model(folder / family, family, tied=tied, **sizes), 99)
    return {family: str(folder / family) for family in FAMILIES}


def make_engine(directory: str, **options: Any) -> Any:
    from transformers import AutoConfig

    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.vllm.engine import VLLMEngine

    defaults = {
        "dtype": torch.float32,
        "stop": (2, 3),
        "tied": AutoConfig.from_pretrained(directory).tie_word_embeddings,
        "max_sequences": 64,
        "max_tokens": 64,
        "kv_cache_gb": 0.1,
    }
    return VLLMEngine(directory, load_tokenizer(directory), **(defaults | options))


def prompts() -> list:
    from megatron_rl.types import Prompt

    return [Prompt(index=i, text="", token_ids=tuple(ids)) for i, ids in enumerate(PROMPTS)]


def followed(directory: str, layout: dict, tp: int, updates: int) -> tuple[list[float], list, list]:
    """The largest gap to the trainer after each update; the greedy answers of vLLM and of transformers at the end."""
    from megatron_rl.data.samples import from_example
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine
    from megatron_rl.rollout.sync import parity_gap, push

    worker = make_worker(directory, layout)
    engine = make_engine(directory, tp=tp)
    assert not [path for path in Path("/dev/shm").iterdir() if "cpushm" in path.name]
    gaps = []
    for number in range(1 + updates):
        if number:
            update(worker)
        assert push(worker.named_hf_weights, engine, worker.version) == {"sync/wrong_tensors": 0.0}
        rollouts = [r for group in engine.generate(prompts(), sampling()) for r in group.rollouts]
        assert {rollout.policy_version for rollout in rollouts} == {worker.version}
        samples = [from_example(i, PROMPTS[r.prompt_index], r.token_ids) for i, r in enumerate(rollouts)]
        gaps.append(parity_gap(rollouts, worker.log_probs(samples, worker.plan(samples, 4096), 0.8))[0])
    other = HFEngine(directory, load_tokenizer(directory), dtype=torch.float32, stop=(2, 3), pad=0, max_sequences=64)
    push(worker.named_hf_weights, other, worker.version)
    greedy = [e.generate(prompts(), sampling(temperature=0.0, group_size=1)) for e in (engine, other)]
    engine.close()
    return gaps, *greedy


@pytest.mark.parametrize(
    ("family", "layout", "tp"),
    [
        ("llama", {"tp": 2}, 2),
        ("qwen2", {"tp": 2}, 1),
        ("qwen3", {"pp": 2}, 1),
        ("qwen3_moe", {"tp": 2, "sequence_parallel": True, "ep": 2}, 1),
    ],
    ids=["llama_over_two_ranks", "qwen2_tied_tp2", "qwen3_tied_pp2", "experts_over_two_ranks"],
)
def test_log_probs_are_the_trainers_through_ten_updates(
    pool: Pool, models: dict[str, str], family: str, layout: dict, tp: int
) -> None:
    """And greedy answers are those of transformers, with their log-probabilities."""
    for gaps, mine, theirs in pool.run(followed, 2, models[family], layout, tp, 10):
        assert len(gaps) == 11 and max(gaps) < 1e-4, gaps
        for group, expected in zip(mine, theirs, strict=True):
            (found,), (wanted,) = group.rollouts, expected.rollouts
            assert (found.token_ids, found.text, found.finish_reason) == (
                wanted.token_ids,
                wanted.text,
                wanted.finish_reason,
            )
            assert found.log_probs == wanted.log_probs == (0.0,) * len(found.token_ids)
            assert found.log_kept_mass == pytest.approx(wanted.log_kept_mass, abs=1e-4)


def draws(directory: str) -> list:
    """The same draws, alone and together; draws of another step; and ends by a text."""
    from megatron_rl.rollout.sync import push

    worker = make_worker(directory, {})
    engine = make_engine(directory)
    before = torch.random.get_rng_state()
    push(worker.named_hf_weights, engine, worker.version)
    assert torch.equal(torch.random.get_rng_state(), before)
    together, again = (engine.generate(prompts(), sampling()) for _ in range(2))
    alone = engine.generate(prompts()[2:3], sampling(first=2))
    other = engine.generate(prompts(), sampling(stream=(0, 10)))
    word = together[2].rollouts[1].text.split()[1]
    stopped = engine.generate(prompts(), sampling(stop=(word,)))
    engine.close()
    torch.distributed.barrier()  # the trainer's own process group is still there
    return [together, again, alone, other, stopped, word]


def test_draws_have_keys_and_texts_end_responses(pool: Pool, models: dict[str, str]) -> None:
    together, again, alone, other, stopped, word = pool.run(draws, 1, models["llama"])[0]

    def tokens(groups: list) -> list:
        return [[rollout.token_ids for rollout in group.rollouts] for group in groups]

    assert tokens(together) == tokens(again) and tokens(together)[2:3] == tokens(alone)
    assert tokens(together) != tokens(other)
    everything = [ids for group in tokens(together) for ids in group]
    assert len(set(everything)) > 0.9 * len(everything)
    ended = 0
    for group, before in zip(stopped, together, strict=True):
        for rollout, whole in zip(group.rollouts, before.rollouts, strict=True):
            assert rollout.token_ids == whole.token_ids[: len(rollout.token_ids)]
            by_text = word in rollout.text
            ended += by_text
            if by_text:
                assert rollout.finish_reason == "stop" and word not in rollout.text[: -len(word)]
            else:
                assert rollout.token_ids == whole.token_ids
    assert ended > 0


def many_long_prompts(directory: str) -> list:
    """More tokens than are read in one pass."""
    from megatron_rl.rollout.sync import push
    from megatron_rl.types import Prompt

    worker = make_worker(directory, {})
    engine = make_engine(directory, max_tokens=512)
    push(worker.named_hf_weights, engine, worker.version)
    long = [Prompt(index=i, text="", token_ids=tuple(5 + (i * j) % 90 for j in range(450))) for i in range(1, 13)]
    groups = [engine.generate(asked, sampling(group_size=1)) for asked in (long, long[:1])]
    engine.close()
    return [[group.rollouts[0].token_ids for group in asked] for asked in groups]


def test_prompts_that_do_not_fit_into_one_pass(pool: Pool, models: dict[str, str]) -> None:
    """vLLM would read one of them in parts, which it cannot on a CPU where requests have seeds."""
    ((together, alone),) = pool.run(many_long_prompts, 1, models["llama"])
    assert len(together) == 12 and together[:1] == alone


CONFIG = """
trainer: grpo
model: {path: model}
optim: {lr: 1e-2}
data: {train: train.jsonl, max_prompt_tokens: 200}
train: {steps: 3, batch_size: 4}
rollout: {engine: vllm, group_size: 4, max_new_tokens: 8, parity_every: 1, vllm: {kv_cache_gb: 0.1}}
reward: {name: "judge.py:judge", workers: 1}
algorithm: {name: grpo}
run: {dir: run}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, and long prompts: vLLM keeps whole blocks of 128 tokens."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_tokenizer(tiny_model(folder / "model", "llama", tied=True, **SIZES), 99)
    rows = [{"prompt": " ".join(f"w{5 + (i * j) % 90}" for j in range(180)), "answer": ""} for i in range(1, 20)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "judge.py").write_text("def judge(prompt, rollout):\n    return float(rollout.token_ids[0] % 2)\n")
    (folder / "config.yaml").write_text(CONFIG)
    return folder


@pytest.mark.parametrize("layout", ["tp", "dp"])
def test_three_steps_of_training(pool: Pool, folder: Path, tmp_path: Path, layout: str) -> None:
    options = [f"parallel.{layout}=2", f"run.dir={tmp_path}/run"]
    pool.run(train, 2, str(folder), "config.yaml", options)
    rows = steps(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["rollout/log_prob_gap_max"] < 1e-4 and row["sync/wrong_tensors"] == 0
    assert max(row["actor/grad_norm"] for row in rows) > 0


BFLOAT16 = ["model.dtype=bfloat16", "rollout.parity_tolerance=1"]


def frugal(cwd: str, config: str, overrides: list[str]) -> set[int]:
    """The bytes of gradients that are held while the engine answers."""
    from megatron_rl.rollout.vllm.engine import VLLMEngine
    from megatron_rl.workers.model_worker import ModelWorker

    workers: list[ModelWorker] = []
    held = set()
    with pytest.MonkeyPatch.context() as patch:
        make, generate = ModelWorker.__init__, VLLMEngine.generate

        def made(self: Any, *arguments: Any, **options: Any) -> None:
            make(self, *arguments, **options)
            workers.append(self)

        def answering(self: Any, *arguments: Any) -> list:
            buffers = [buffer for worker in workers for chunk in worker.chunks for buffer in chunk.buffers]
            held.add(sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers))
            return generate(self, *arguments)

        patch.setattr(ModelWorker, "__init__", made)
        patch.setattr(VLLMEngine, "generate", answering)
        train(cwd, config, overrides)
    return held


def test_gradients_are_freed_while_the_engine_answers(pool: Pool, folder: Path, tmp_path: Path) -> None:
    """And every figure is the same. On a CPU vLLM keeps its own memory."""
    options = {
        name: [f"run.dir={tmp_path}/{name}", f"rollout.vllm.sleep={name}", *BFLOAT16] for name in ("false", "true")
    }
    (all_the_time,) = pool.run(frugal, 1, str(folder), "config.yaml", options["false"])
    assert len(all_the_time) == 1 and min(all_the_time) > 0
    assert pool.run(frugal, 1, str(folder), "config.yaml", options["true"]) == [{0}]
    figures = ("critic/score/mean", "actor/loss", "actor/grad_norm", "rollout/entropy")
    for row, wanted in zip(steps(tmp_path / "true"), steps(tmp_path / "false"), strict=True):
        assert [row[key] for key in figures] == [wanted[key] for key in figures]


def planted(cwd: str, config: str, overrides: list[str], trap: str) -> str:
    """What a run says in which vLLM is left to itself."""
    from megatron_rl.rollout.vllm.engine import VLLMEngine

    with pytest.MonkeyPatch.context() as patch:
        if trap == "output layer":
            start = VLLMEngine.load_weights

            def load_weights(self: Any, weights: Any, version: int) -> None:
                self.tied = False
                start(self, weights, version)

            patch.setattr(VLLMEngine, "load_weights", load_weights)
        elif trap == "cached prefix":

            def keep(self: Any, weights: Any) -> None:
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})

            patch.setattr(VLLMEngine, "_update", keep)
        else:

            def raw(self: Any, weights: Any) -> None:
                self.llm.apply_model(lambda model: model.load_weights(weights))

            patch.setattr(VLLMEngine, "_update", raw)
        try:
            train(cwd, config, overrides)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("trap", "message"),
    [
        ("output layer", "ParityError: the engine's log-probabilities differ from the trainer's by up to"),
        ("cached prefix", "ParityError: the engine's log-probabilities differ from the trainer's by up to"),
        ("raw load", "load weight"),
    ],
)
def test_every_trap_is_found(pool: Pool, folder: Path, tmp_path: Path, trap: str, message: str) -> None:
    """The cached prefix at the second update: only prompts that are asked again begin from it."""
    (said,) = pool.run(planted, 1, str(folder), "config.yaml", [f"run.dir={tmp_path}/run"], trap)
    assert message in said, said
    assert len(steps(tmp_path / "run")) == (1 if trap == "cached prefix" else 0)


def experts(directory: str, patched: bool) -> list[float]:
    """Gaps to transformers after each of three loads of a mixture of experts, with vLLM left to itself or not."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    from megatron_rl.rollout.vllm.experts import pack_experts_again

    pack_experts_again()
    repaired = Method._setup_kernel
    engine = make_engine(directory)
    if not patched:
        Method._setup_kernel = repaired.__wrapped__
    try:
        return gaps_to_transformers(engine, directory)
    finally:
        Method._setup_kernel = repaired
        engine.close()


def gaps_to_transformers(engine: Any, directory: str) -> list[float]:
    from transformers import AutoModelForCausalLM

    from megatron_rl.models.hf_config import named_weights

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    gaps = []
    for version in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.02)
        engine.load_weights(named_weights(model, model.state_dict()).items(), version)
        (group,) = engine.generate(prompts()[2:3], sampling(group_size=1, temperature=1.0))
        (rollout,) = group.rollouts
        ids = torch.tensor([PROMPTS[2] + list(rollout.token_ids)])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        exact = [float(logp[len(PROMPTS[2]) - 1 + i, token]) for i, token in enumerate(rollout.token_ids)]
        gaps.append(max(abs(a - b) for a, b in zip(rollout.log_probs, exact, strict=True)))
    return gaps


def test_experts_are_packed_anew(pool: Pool, tmp_path: Path) -> None:
    """Where vLLM packs them at all, it is far off without: with AVX2 it computes from the weights as they came."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        initializer_range=0.15,
    )
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer(tmp_path, 99)
    (gaps,) = pool.run(experts, 1, str(tmp_path), True)
    assert max(gaps) < 1e-4, gaps
    (alone,) = pool.run(experts, 1, str(tmp_path), False)
    packs_none = max(alone) < 1e-4
    assert packs_none or max(alone) > 1e-2, alone


def test_heads_that_vllm_cannot_run_are_told_before_the_start(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from megatron_rl.cli import main

    small = {**SIZES, "hidden_size": 64}
    tiny_tokenizer(tiny_model(tmp_path / "model", "llama", **small), 99)
    monkeypatch.chdir(folder)
    assert main(["check", "config.yaml"]) == 0
    capsys.readouterr()
    assert main(["check", "config.yaml", f"model.path={tmp_path}/model"]) == 2
    assert "heads of 16 columns" in capsys.readouterr().err
    assert main(["check", "config.yaml", f"model.path={tmp_path}/model", "rollout.engine=hf"]) == 0
