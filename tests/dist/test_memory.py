"""The planner's bytes against those that ranks really hold."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_rl.ops.products import factor_dtype
from tests.dist.pool import Pool

TOOL = Path(__file__).parents[2] / "tools" / "check_memory.py"
# Of parts that are sums of parameters, and of what more is in memory at a time.
EXACT, NEAR = 2e-3, 0.1
PEAKS = ("rollouts", "update", "a save", "activations", "held between steps")
SHORT = ("llama_fp32_grpo", "qwen3_bf16_pp2_sdpo")
LONG = (
    "qwen2_bf16_tp2_sp_grpo",
    "llama_bf16_dp2_ppo",
    "qwen3_fp32_tp2_pp2_recompute",
    "qwen2_fp32_pp2_vpp2",
    "llama_fp32_tp2_dp2",
    "llama_bf16_recompute",
    "llama_fp32_sdpo_mixed",
    "qwen3_moe_bf16_tp2_ep2",
    "mixtral_bf16_tp2_etp2",
    "qwen3_moe_fp32_ep2_recompute",
)


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_memory", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(name: str, path: str) -> list[tuple]:
    return [tuple(row) for row in tool().measure(name, path)]


SLOW = factor_dtype(torch.empty(0, dtype=torch.bfloat16)) != torch.bfloat16
needs_instructions = pytest.mark.skipif(SLOW, reason="this CPU has no instructions for bfloat16: it takes minutes")
SHORT_CASES = [pytest.param(name, marks=needs_instructions if "bf16" in name else ()) for name in SHORT]


@pytest.mark.parametrize("name", [*SHORT_CASES, *(pytest.param(name, marks=pytest.mark.full) for name in LONG)])
def test_predicted_is_measured(pool: Pool, tmp_path: Path, name: str) -> None:
    checks = tool()
    assert set(SHORT) | set(LONG) == set(checks.CASES)
    path = checks.write_case(tmp_path, name, scale=1)
    ranks = pool.run(measured, checks.CASES[name].world, name, str(path))
    rows = [checks.Measured(*row) for rank in ranks for row in rank]
    assert {"weights", "gradients", "optimizer", *PEAKS} <= {row.what for row in rows}
    off = [
        f"rank {row.rank}, {row.what}: predicted {row.predicted:,}, measured {row.measured:,}"
        for row in checks.fullest(rows)
        if abs(row.ratio - 1) > (NEAR if row.what in PEAKS else EXACT)
    ]
    assert not off, "\n".join(off)


def test_live_bytes_are_those_of_storages() -> None:
    live = tool().LiveBytes()
    with live:
        first = torch.ones(1000)
        view = first[10:20]
        second = first * 2
        assert live.now() == 8000
        del second
        assert live.now() == 4000 and live.peak == 8000
        live.reset()
        third = view + 1
        assert live.peak == 4040
        del first, view, third
        assert live.now() == 0
