"""What must not happen: an update that is not finite leaves no trace on any rank, and no engine holds other weights."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_invariance import make_samples, objective
from tests.dist.test_worker import make_worker, update
from tests.models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=True)
    tiny_tokenizer(directory, 99)
    return str(directory)


def picture(worker: Any) -> list:
    """All that a step changes on this rank."""
    inner = [optimizer.optimizer for optimizer in worker.optimizer.chained_optimizers]
    tensors = [parameter for chunk in worker.models for parameter in chunk.parameters()]
    tensors += [p for each in inner for group in each.param_groups for p in group["params"]]
    tensors += [t for each in inner for state in each.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
    numbers = [group["step"] for each in inner for group in each.param_groups]
    return [t.detach().clone() for t in tensors], numbers, worker.scheduler.num_steps, worker.lr, worker.version


def same(a: list, b: list) -> bool:
    return a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def a_norm(worker: Any) -> Any:
    """A weight that tensor-parallel ranks hold twice: megatron-core's norm counts the first rank's gradient alone."""
    return [p for name, p in worker.models[-1].named_parameters() if "norm" in name][-1]


class Infinite:
    """An objective whose value is infinite, and whose gradient is not."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, tokens: Any) -> Any:
        outcome = self.inner(tokens)
        return outcome._replace(loss=outcome.loss + math.inf)


def poisoned(directory: str, layout: dict, dtype: str, poison: str) -> tuple:
    """A step, one with a poison on the last rank only, and another step."""
    worker = make_worker(directory, layout, dtype, lr=1e-2, warmup_steps=3)
    update(worker)
    before = picture(worker)
    samples = make_samples("token-mean")
    sick = dist.get_rank() == dist.get_world_size() - 1
    loss: Any = objective("grpo")
    if poison == "loss":
        loss = Infinite(loss) if sick else loss
        worker.forward_backward(samples, worker.plan(samples, 48), loss)
    else:
        factor = {"nan": math.nan, "inf": math.inf}[poison]
        # On its way into the gradient buffer, before the ranks' gradients are added up.
        hook = a_norm(worker).register_hook(lambda grad: grad * factor if sick else grad)
        worker.forward_backward(samples, worker.plan(samples, 48), loss)
        hook.remove()
    result = worker.step()
    unchanged = same(before, picture(worker))
    return (result.applied, math.isnan(result.grad_norm), unchanged), update(worker)


def two_steps(directory: str, layout: dict, dtype: str) -> tuple:
    worker = make_worker(directory, layout, dtype, lr=1e-2, warmup_steps=3)
    update(worker)
    return update(worker)


@pytest.mark.parametrize(
    ("layout", "dtype", "poisons"),
    [
        ({"tp": 2}, "float32", ["nan", "loss"]),
        ({"tp": 2, "sequence_parallel": True}, "bfloat16", ["inf"]),
        ({"pp": 2}, "float32", ["inf", "loss"]),
        ({"dp": 2}, "bfloat16", ["nan"]),
        ({"dp": 2}, "float32", ["inf", "loss"]),
    ],
    ids=["tp2", "tp2_sp_bf16", "pp2", "dp2_bf16", "dp2"],
)
def test_an_update_that_is_not_finite_leaves_no_trace(
    pool: Pool, model: str, layout: dict, dtype: str, poisons: list[str]
) -> None:
    """Weights, moments, rate and version are what they were on every rank; the next update is as if it were second."""
    expected = pool.run(two_steps, 2, model, layout, dtype)
    for poison in poisons:
        for (applied, no_norm, unchanged), after in pool.run(poisoned, 2, model, layout, dtype, poison):
            assert (applied, no_norm, unchanged) == (False, True, True), poison
            assert after == expected[0], poison


def unguarded(directory: str, dtype: str, factor: float) -> list[bool]:
    """Whether megatron-core's own step leaves finite weights, and says that it was applied."""
    worker = make_worker(directory, {}, dtype, lr=1e-2)
    samples = make_samples("token-mean")
    hook = a_norm(worker).register_hook(lambda grad: grad * factor)
    worker.forward_backward(samples, worker.plan(samples, 48), objective("grpo"))
    hook.remove()
    applied, _, _ = worker.optimizer.step()
    return [bool(applied), all(bool(p.isfinite().all()) for m in worker.models for p in m.parameters())]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_megatron_core_does_not_guard_the_step(pool: Pool, model: str, dtype: str) -> None:
    """Why the worker looks first: without a loss scaler a NaN or an infinity is applied, and reported as applied."""
    for factor in (math.nan, math.inf):
        assert pool.run(unguarded, 1, model, dtype, factor) == [[True, False]]


VICTIM = "model.layers.2.mlp.down_proj.weight"


def spoil(parameter: Tensor, fault: str) -> None:
    if fault == "rounds":
        parameter.copy_(parameter.bfloat16())
    elif fault == "permutes":
        parameter.copy_(parameter[torch.arange(len(parameter)) ^ 1])
    elif fault == "drops":
        parameter.fill_(0.5)


def push_to(directory: str, fault: str, check: bool, taker: int | None = None) -> str:
    """What a sync says where the engine of the last rank has a fault, and of all ranks or one the tensors are taken."""
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine
    from megatron_rl.rollout.sync import WeightSyncError, push

    class Faulty(HFEngine):
        @torch.no_grad()
        def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
            super().load_weights(weights, version)
            if dist.get_rank() == dist.get_world_size() - 1:
                spoil(dict(self.model.named_parameters())[VICTIM].data, fault)

    worker = make_worker(directory, {"tp": 2})
    engine = Faulty(directory, load_tokenizer(directory), dtype=torch.float32, stop=(2,), pad=0, max_sequences=4)
    engine.takes = taker in (None, dist.get_rank())
    try:
        figures = push(worker.named_hf_weights, engine, 3, check=check)
    except WeightSyncError as error:
        return str(error)
    engine.load_weights = None  # type: ignore[assignment, method-assign]
    push(worker.named_hf_weights, engine, 3)  # it has them, and takes them no second time
    return str(figures)


def test_an_engine_that_does_not_hold_what_it_was_sent_stops_every_rank(pool: Pool, model: str, tmp_path: Path) -> None:
    for fault in ("rounds", "permutes", "drops"):
        for said in pool.run(push_to, 2, model, fault, True):
            assert said.startswith("after the sync of policy version 3 1 of 50 tensors in the engine are not what")
            assert VICTIM in said and "Likely cause: the engine dropped, permuted or rounded" in said
    assert pool.run(push_to, 2, model, "", True) == ["{'sync/wrong_tensors': 0.0}"] * 2
    assert pool.run(push_to, 2, model, "rounds", False) == ["{}"] * 2


def test_where_an_engine_takes_one_ranks_tensors_they_alone_are_compared(pool: Pool, model: str) -> None:
    said = pool.run(push_to, 2, model, "rounds", True, 1)
    assert said[0] == said[1] and "1 of 50 tensors" in said[0]
    assert pool.run(push_to, 2, model, "rounds", True, 0) == ["{'sync/wrong_tensors': 0.0}"] * 2
