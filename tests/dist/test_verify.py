"""The certificate that `megatron-rl verify` prints, for configs of every trainer and family; and that it can fail."""

import contextlib
import io
import os
from pathlib import Path

import pytest

from megatron_rl.config.load import load_config
from megatron_rl.models.hf_config import load_shape
from megatron_rl.trainers import verify
from megatron_rl.trainers.verify import Cut, cuts, difference, gradient, tiny_directory
from tests.dist.pool import Pool
from tests.models import tiny_model

CONFIG = """
trainer: {trainer}
model: {{path: {model}}}
data: {{train: none.jsonl}}
train: {{steps: 1, batch_size: 4}}
run: {{dir: none}}
"""
CASES = {
    "sft": ("sft", "llama", []),
    "expert_iteration": (
        "expert_iteration",
        "qwen2",
        ["train.aggregation=seq-mean-token-sum-norm", "train.normalizer=7.5"],
    ),
    "grpo": ("grpo", "qwen2", ["kl.where=loss", "algorithm.entropy_coeff=0.01", "rollout.temperature=0.8"]),
    "ema": (
        "grpo",
        "llama",
        [
            *("ema.axis=token", "ema.beta=0.6", "kl.where=loss", "kl.gradient=is_ratio"),
            *("rollout_correction.level=token", "rollout_correction.opsm_delta=0.01"),
        ],
    ),
    "sdpo": ("sdpo", "qwen3", ["distill.topk=20", "teacher.mode=trust_region", "teacher.rate=0.3"]),
    "sdpo_full": ("sdpo", "qwen2", ["distill.support=full", "distill.alpha=1", "distill.is_clip=null"]),
    "sdpo_blend": (
        "sdpo",
        "qwen3",
        ["distill.support=full", "distill.weight=0.4", "distill.entropy_weighting=0.5", "algorithm.name=gspo"],
    ),
    "ppo": ("ppo", "qwen2", []),
    "gad": ("gad", "llama", []),
    "mixture": ("grpo", "qwen3_moe", []),
    "sdpo_mixture": ("sdpo", "mixtral", []),
    "ppo_mixture": ("ppo", "qwen3_moe", []),
    "gspo": ("grpo", "qwen3", ["algorithm.name=gspo", "algorithm.clip_high=0.3", "algorithm.clip_low=0.3"]),
}


def measure(config: str, overrides: list[str], directory: str, cut: Cut) -> verify.Gradient:
    return gradient(load_config(config, overrides), directory, cut)


@pytest.fixture
def prepared(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str], str]:
    """A config of the case, its overrides, and the tiny model's directory."""
    trainer, family, overrides = CASES[request.param]
    model = tiny_model(tmp_path / "model", family, tied=True, vocab_size=200)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(trainer=trainer, model=model))
    tiny_directory(str(model), tmp_path / "tiny")
    return str(config), overrides, str(tmp_path / "tiny")


# One config and three cuts each time; every loss is cut in test_invariance and test_distillation as well.
ALL = [cut.name for cut in cuts(2)]
SHORT = ["tp2 sequence_parallel", "pp2 vpp2", "one sequence per micro-batch"]
MARKED = [("grpo", SHORT), *(pytest.param(case, ALL, marks=pytest.mark.full) for case in CASES)]


@pytest.mark.parametrize(("prepared", "names"), MARKED, indirect=["prepared"])
def test_every_cut_agrees(pool: Pool, prepared: tuple[str, list[str], str], names: list[str]) -> None:
    reference = Cut(name="reference", max_tokens=verify.WIDE)
    expected = pool.run(measure, 1, *prepared, reference)[0]
    # To some experts the router sends nothing.
    reached = [value.abs().max() > 0 for name, value in expected.named.items() if ".experts." not in name]
    assert expected.loss != 0 and all(reached)
    experts = load_shape(prepared[2]).experts is not None
    chosen = [cut for cut in cuts(2, experts=experts) if experts or cut.name in names]
    assert experts or len(chosen) == len(names)
    for cut in chosen:
        for found in pool.run(measure, 2, *prepared, cut):
            apart = difference(found, expected)
            assert apart.loss < verify.TOLERANCE and apart.gradient < verify.TOLERANCE, (cut, apart)


def measure_critic(config: str, overrides: list[str], directory: str, cut: Cut) -> verify.Gradient:
    return gradient(load_config(config, overrides), directory, cut, critic=True)


@pytest.mark.full
@pytest.mark.parametrize("prepared", ["ppo", "gad", "ppo_mixture"], indirect=True)
def test_every_cut_of_a_critic_agrees(pool: Pool, prepared: tuple[str, list[str], str]) -> None:
    expected = pool.run(measure_critic, 1, *prepared, Cut(name="reference", max_tokens=verify.WIDE))[0]
    assert expected.loss != 0 and expected.named["score.weight"].abs().max() > 0
    for cut in cuts(2, experts=load_shape(prepared[2]).experts is not None):
        for found in pool.run(measure_critic, 2, *prepared, cut):
            apart = difference(found, expected)
            assert apart.loss < verify.TOLERANCE and apart.gradient < verify.TOLERANCE, (cut, apart)


def test_every_layout_of_eight_ranks_is_there() -> None:
    layouts = {tuple(sorted(cut.layout.items())) for cut in cuts(8)}
    assert {(("pp", pp), ("tp", tp)) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8) if tp * pp <= 8} <= layouts
    assert (("pp", 2), ("tp", 4), ("vpp", 2)) in layouts


def test_experts_are_cut_over_every_stage() -> None:
    """In a stage of 2 tp x 2 dp: whole, or over 2 or 4 ranks, by experts, within them, or both."""
    layouts = [cut.layout for cut in cuts(4, experts=True) if cut.layout.get("tp") == 2 and cut.layout["pp"] == 1]
    assert all(layout["sequence_parallel"] for layout in layouts)
    found = [(layout.get("ep", 1), layout.get("etp", 1)) for layout in layouts]
    assert sorted(found) == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]


@pytest.mark.parametrize("prepared", ["mixture"], indirect=True)
def test_a_mixture_of_experts_agrees(pool: Pool, prepared: tuple[str, list[str], str]) -> None:
    expected = pool.run(measure, 1, *prepared, Cut(name="reference", max_tokens=verify.WIDE))[0]
    (cut,) = [cut for cut in cuts(2, experts=True) if cut.layout.get("tp") == 2 and cut.layout.get("ep") == 2]
    for found in pool.run(measure, 2, *prepared, cut):
        apart = difference(found, expected)
        assert apart.loss < verify.TOLERANCE and apart.gradient < verify.TOLERANCE, (cut, apart)


@pytest.mark.full
@pytest.mark.parametrize("prepared", ["ppo"], indirect=True)
def test_ppo_has_two_tables(prepared: tuple[str, list[str], str], capsys: pytest.CaptureFixture) -> None:
    assert verify.verify(load_config(prepared[0])) == 0
    said = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if " on a tiny " in line]
    assert said == ["ppo on a tiny qwen2", "the critic of ppo on a tiny qwen2"]


def verify_aloud(config: str, tolerance: float) -> tuple[int, list[str]]:
    """Its exit code and lines, in a world of one rank that it makes for itself."""
    import torch.distributed as dist

    dist.destroy_process_group()
    assert "RANK" not in os.environ
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(verify, "TOLERANCE", tolerance)
        code = verify.verify(load_config(config))
    return code, said.getvalue().splitlines()


@pytest.mark.parametrize("prepared", ["sft"], indirect=True)
def test_the_table_and_its_exit_code(pool: Pool, prepared: tuple[str, list[str], str]) -> None:
    """Rounding alone is a difference where none is allowed."""
    ((code, lines),) = pool.run(verify_aloud, 1, prepared[0], verify.TOLERANCE)
    assert code == 0 and len(lines) == 2 + len(list(cuts(1))) and "DIFFERS" not in "".join(lines)
    assert lines[-1].startswith("sft on a tiny llama, 1 rank(s): the gradient is the same within 1e-05")
    ((code, lines),) = pool.run(verify_aloud, 1, prepared[0], 0.0)
    assert code == 1 and "differs by more than 0" in lines[-1]
