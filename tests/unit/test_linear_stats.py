"""The vocabulary operator against its dense definition: values, gradients, memory, and degenerate shards."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.ops import logit_stream, reference
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.vocab_shard import VocabShard

N, H, V = 37, 17, 1003


def inputs(dtype: torch.dtype = torch.float64, n: int = N, h: int = H, v: int = V, padding: int = 0) -> list[Tensor]:
    """hidden, weight (with NaN on the padding), labels, and weights for the two outputs."""
    generator = torch.Generator().manual_seed(n + 31 * v)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    weight = torch.cat([draw(v, h), torch.full((padding, h), torch.nan, dtype=dtype)])
    labels = torch.randint(0, v, (n,), generator=generator)
    return [draw(n, h).requires_grad_(), weight.requires_grad_(), labels, draw(n).double(), draw(n).double()]


def with_grads(outputs: Any, hidden: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    logp, entropy = outputs[:2]
    grads = torch.autograd.grad((a * logp).sum() + (b * entropy).sum(), (hidden, weight))
    return [logp.detach(), entropy.detach(), *grads]


def worst(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((x - y).detach().abs().max()) for x, y in zip(left, right, strict=True))


@pytest.mark.parametrize("chunk", [1, 64, 1000, 1003, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_equals_the_definition(chunk: int, temperature: float) -> None:
    hidden, weight, labels, a, b = inputs()
    expected = with_grads(reference.linear_stats(hidden, weight, labels, temperature), hidden, weight, a, b)
    stats = linear_stats(
        hidden, weight, labels, shard=VocabShard(0, V), temperature=temperature, entropy=True, chunk=chunk
    )
    assert worst(with_grads(stats, hidden, weight, a, b), expected) < 1e-12


def test_padding_is_never_read_and_gets_zero_gradient() -> None:
    hidden, weight, labels, a, b = inputs(padding=21)
    true_weight = weight[:V].detach().requires_grad_()
    expected = with_grads(reference.linear_stats(hidden, true_weight, labels), hidden, true_weight, a, b)
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True, chunk=100)
    logp, entropy, grad_hidden, grad_weight = with_grads(stats, hidden, weight, a, b)
    assert worst([logp, entropy, grad_hidden, grad_weight[:V]], expected) < 1e-12
    assert torch.equal(grad_weight[V:], torch.zeros(21, H, dtype=torch.float64))


def test_each_output_alone() -> None:
    hidden, weight, labels, a, _ = inputs()
    logp, entropy = reference.linear_stats(hidden, weight, labels)
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True)
    bare = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=False)
    assert bare.entropy is None and stats.entropy is not None
    for ours, theirs in ((stats.logp, logp), (bare.logp, logp), (stats.entropy, entropy)):
        expected = torch.autograd.grad((a * theirs).sum(), (hidden, weight), retain_graph=True)
        got = torch.autograd.grad((a * ours).sum(), (hidden, weight), retain_graph=True)
        assert worst([ours, *got], [theirs, *expected]) < 1e-12


def test_gradcheck() -> None:
    hidden, weight, labels, _, _ = inputs(n=4, h=3, v=11)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_stats(hidden, weight, labels, shard=VocabShard(0, 11), temperature=0.8, entropy=True, chunk=4)[:2]

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_the_dense_operator(dtype: torch.dtype) -> None:
    hidden, weight, labels, a, b = inputs(dtype, n=128, h=64)
    a, b = a.float(), b.float()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = with_grads(
        reference.linear_stats(exact_hidden, exact_weight, labels), exact_hidden, exact_weight, a.double(), b.double()
    )
    dense = with_grads(reference.linear_stats(hidden, weight, labels), hidden, weight, a, b)
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True, chunk=128)
    ours = with_grads(stats, hidden, weight, a, b)
    assert [x.dtype for x in ours] == [torch.float32, torch.float32, dtype, dtype]
    for mine, theirs, truth in zip(ours, dense, exact):
        assert (mine - truth).norm() < 1.2 * (theirs - truth).norm()


def test_large_logits_lose_nothing() -> None:
    """Adding a constant to all logits changes neither result, even where float32 has few digits left."""
    hidden, weight, labels, _, _ = inputs(torch.float32)
    ones = torch.full((N, 1), 1e4)
    shifted = linear_stats(
        torch.cat([hidden.detach(), ones], 1),
        torch.cat([weight.detach(), torch.ones(V, 1)], 1),
        labels,
        shard=VocabShard(0, V),
        entropy=True,
    )
    plain = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True)
    assert shifted.entropy is not None and plain.entropy is not None
    rounding = 2e-3  # of a logit near 1e4
    assert (shifted.logp - plain.logp).abs().max() < 2 * rounding
    assert (shifted.entropy - plain.entropy).abs().max() < 20 * rounding
    assert (shifted.entropy >= 0).all()


def test_minus_infinity_is_not_nan() -> None:
    """A column of probability 0: the label on it has logp -inf, the others and all gradients are what they were."""
    hidden, weight, labels, a, b = inputs(n=5, v=8)
    with torch.no_grad():
        hidden[:, 0] = 1.0
        hidden[:, 1:].clamp_(-1, 1)
        weight[3] = 0.0
        weight[3, 0] = -torch.inf
    labels = torch.tensor([0, 1, 2, 4, 5])
    for chunk in (1, 3, 8):
        stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, 8), entropy=True, chunk=chunk)
        assert worst(list(stats[:2]), list(reference.linear_stats(hidden, weight, labels))) < 1e-12
        _, _, _, grad_weight = with_grads(stats, hidden, weight, a, b)
        assert grad_weight.isfinite().all() and not grad_weight[3].any()
    on_it = linear_stats(hidden, weight, torch.full_like(labels, 3), shard=VocabShard(0, 8))
    assert (on_it.logp == -torch.inf).all()


@pytest.mark.parametrize("shard", [VocabShard(0, V), VocabShard(V, V)])
def test_no_tokens_still_give_gradients(shard: VocabShard) -> None:
    hidden, weight, labels, _, _ = inputs(n=0)
    stats = linear_stats(hidden, weight, labels, shard=shard, entropy=True, chunk=100)
    assert stats.entropy is not None and stats.logp.shape == stats.entropy.shape == (0,)
    (stats.logp.sum() + stats.entropy.sum()).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    assert weight.grad is not None and torch.equal(weight.grad, torch.zeros_like(weight))


class Group:
    """A process group of threads: the one collective that the operator may call, and how often it did."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self._rank, self._barrier = threading.local(), threading.Barrier(size)
        self._parts: list[Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def on(rank: int) -> Any:
            self._rank.value = rank
            return work(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(on, range(self.size)))

    def all_gather_into_tensor(self, out: Tensor, part: Tensor, group: object) -> None:
        assert group is self
        self._parts[self._rank.value] = part.clone()
        self.calls += 1
        self._barrier.wait(timeout=10)
        out.copy_(torch.cat(self._parts).view(out.shape))
        self._barrier.wait(timeout=10)


@pytest.mark.parametrize(("world", "rows"), [(2, 502), (3, 512), (4, 400)])
def test_shards_give_the_whole(world: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven shards; with 4 x 400 rows the last one has no valid row. One collective in all."""
    hidden, weight, labels, a, b = inputs()
    expected = with_grads(reference.linear_stats(hidden, weight, labels, 0.7), hidden, weight, a, b)
    group = Group(world)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size)
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", group.all_gather_into_tensor)

    def work(rank: int) -> list[Tensor]:
        shard = VocabShard.of(V, rows, rank, cast(Any, group))
        mine = torch.full((rows, H), torch.nan, dtype=torch.float64)
        mine[: shard.size] = weight.detach()[shard.start : shard.stop]
        stats = linear_stats(hidden, mine.requires_grad_(), labels, shard=shard, temperature=0.7, chunk=100)
        return with_grads(stats, hidden, mine, a, b)

    logp, entropy, grad_hidden, grad_weight = zip(*group.run(work))
    assert group.calls == world
    assert all(torch.equal(x, logp[0]) for x in logp) and all(torch.equal(x, entropy[0]) for x in entropy)
    whole = [logp[0], entropy[0], sum(grad_hidden), torch.cat(grad_weight)[:V]]
    assert worst(whole, expected) < 1e-12
    assert not torch.cat(grad_weight)[V:].any()


def test_shards_by_rank() -> None:
    assert VocabShard.of(1000, 384, 0, None) == VocabShard(0, 384)
    assert VocabShard.of(1000, 384, 2, None) == VocabShard(768, 1000)
    assert VocabShard.of(700, 384, 2, None) == VocabShard(700, 700) and VocabShard(700, 700).size == 0


class Largest(TorchDispatchMode):
    """Remembers the largest storage, in elements, behind any floating-point result."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *self._sizes(result), 0)
        return result

    @staticmethod
    def _sizes(result: Any) -> Iterator[int]:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                yield leaf.untyped_storage().nbytes() // leaf.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_chunk_of_logits_exists(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the size that is kept."""
    n, h, chunk = 512, 4, 64
    monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    hidden, weight, labels, _, _ = inputs(dtype, n=n, h=h)
    with Largest() as dense:
        sum(reference.linear_stats(hidden, weight, labels)).sum().backward()
    assert dense.numel == n * V  # the watcher sees forward and backward
    with Largest() as ours:
        sum(
            linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True, chunk=chunk)[:2]
        ).sum().backward()
    assert ours.numel == n * chunk


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whether the logits are kept, or forgotten and computed again; and nothing is kept of the latter."""

    def run() -> tuple[list[Tensor], int]:
        hidden, weight, labels, *_ = inputs(dtype)
        stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), temperature=0.7, chunk=16)
        node: Any = stats.logp.grad_fn
        held = sum(logits.numel() for logits in node.kept or [])
        assert stats.entropy is not None
        (stats.logp.sum() + stats.entropy.sum()).backward()
        assert hidden.grad is not None and weight.grad is not None and node.kept is None
        return [stats.logp, stats.entropy, hidden.grad, weight.grad], held

    kept, held = run()
    assert held == N * V
    monkeypatch.setattr(logit_stream, "KEPT_BYTES", N * V * kept[2].element_size() - 1)
    forgotten, held = run()
    assert held == 0
    for a, b in zip(kept, forgotten, strict=True):
        assert torch.equal(a, b)


def test_nothing_else_of_the_vocabulary_is_saved_for_backward() -> None:
    hidden, weight, labels, _, _ = inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=True)
    assert sum(x.numel() for x in saved if x.data_ptr() != weight.data_ptr()) < N * (H + 8)
