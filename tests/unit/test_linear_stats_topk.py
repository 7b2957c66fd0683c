"""Lists of the vocabulary operator, the k largest and given ones, against their dense definition."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rl.ops import logit_stream, reference
from megatron_rl.ops.linear_stats import LinearStats, linear_stats
from megatron_rl.ops.topk import Largest, first_places, merge_largest
from megatron_rl.ops.vocab_shard import VocabShard

N, H, V = 29, 13, 211


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def problem(dtype: torch.dtype = torch.float64, n: int = N, v: int = V, padding: int = 0) -> tuple[Tensor, ...]:
    """hidden, weight (with NaN on the padding), labels."""
    weight = torch.cat([draw(v, H, seed=1, dtype=dtype), torch.full((padding, H), torch.nan, dtype=dtype)])
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(2))
    return draw(n, H, dtype=dtype).requires_grad_(), weight.requires_grad_(), labels


def dense(hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, temperature: float) -> list[Tensor]:
    return [
        *reference.linear_stats(hidden, weight, labels, temperature),
        *reference.listed(hidden, weight, ids, temperature),
    ]


def outputs(stats: LinearStats) -> list[Any]:
    return [stats.logp, stats.entropy, stats.topk_logp, stats.tail_logp]


def grads(results: list[Tensor], inputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Of all results together, each with random upstream gradients."""
    total = sum(((draw(*x.shape, seed=7 + i).to(x) * x).sum() for i, x in enumerate(results)), torch.zeros(()))
    return list(torch.autograd.grad(total, inputs, retain_graph=True))


def assert_equal(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for x, y in zip(got, expected, strict=True):
        assert x.shape == y.shape and (x - y).abs().max() < tolerance


@pytest.mark.parametrize("k", [1, 20, V])
@pytest.mark.parametrize("chunk", [1, 16, 64, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_equals_the_definition(k: int, chunk: int, temperature: float) -> None:
    """The k largest; at k = V nothing is left over, and its share has no gradient."""
    hidden, weight, labels = problem(padding=6)
    true = weight[:V]
    ids = reference.largest(reference.log_probs(hidden, true), k)
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), temperature=temperature, k=k, chunk=chunk)
    assert stats.topk_ids is not None and torch.equal(stats.topk_ids, ids) and stats.topk_ids is stats.largest_ids
    expected = dense(hidden, true, labels, ids, temperature)
    assert_equal(outputs(stats), expected)
    assert_equal(grads(outputs(stats), (hidden, weight)), grads(expected, (hidden, weight)))


@pytest.mark.parametrize("which", ["given", "given and largest"])
def test_given_ids(which: str) -> None:
    """In any order, of any likelihood; the k largest on the side."""
    hidden, weight, labels = problem()
    ids = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:9] for i in range(N)])
    k = 5 if which == "given and largest" else 0
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), k=k, indices=ids, chunk=32)
    expected = dense(hidden, weight, labels, ids, 1.0)
    assert_equal(outputs(stats), expected)
    assert_equal(grads(outputs(stats), (hidden, weight)), grads(expected, (hidden, weight)))
    if k:
        assert stats.largest_ids is not None
        assert torch.equal(stats.largest_ids, reference.largest(reference.log_probs(hidden, weight), k))
    else:
        assert stats.largest_ids is None


def test_each_output_alone() -> None:
    hidden, weight, labels = problem()
    bare = linear_stats(hidden, weight, labels, shard=VocabShard(0, V), entropy=False, k=4, chunk=50)
    assert bare.topk_ids is not None and bare.entropy is None
    expected = dense(hidden, weight, labels, bare.topk_ids, 1.0)
    for got, want in ((bare.logp, expected[0]), (bare.topk_logp, expected[2]), (bare.tail_logp, expected[3])):
        assert isinstance(got, Tensor)
        assert_equal([got, *grads([got], (hidden, weight))], [want, *grads([want], (hidden, weight))])


def test_gradcheck() -> None:
    hidden, weight, labels = draw(3, 2).requires_grad_(), draw(9, 2, seed=1).requires_grad_(), torch.tensor([0, 8, 4])

    def function(hidden: Tensor, weight: Tensor) -> tuple[Any, ...]:
        return tuple(outputs(linear_stats(hidden, weight, labels, shard=VocabShard(0, 9), k=3, chunk=4)))

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("chunk", [1, 3, 16, 64])
@pytest.mark.parametrize("k", [1, 3, 7, 40])
def test_ties_go_to_the_smaller_id(chunk: int, k: int) -> None:
    """Logits that take few values, -inf among them, ascending too: the hardest stream for a running list."""
    values = torch.randint(-2, 3, (64, 40), generator=torch.Generator().manual_seed(k)).double()
    values[:8] = values[:8].sort(1).values
    values[8:12] = 1.0
    values[12:20, :38] = -torch.inf
    values[20] = torch.arange(40)
    weight, labels = torch.eye(40, dtype=torch.float64), torch.zeros(64, dtype=torch.int64)
    finite = values.clamp(min=-1e300)  # 0 * inf is not the logit that is meant
    stats = linear_stats(finite, weight, labels, shard=VocabShard(0, 40), k=k, chunk=chunk)
    assert stats.topk_ids is not None
    assert torch.equal(stats.topk_ids, reference.largest(values, k))


def test_lists_with_minus_infinity() -> None:
    """Columns of probability 0 fill a list in the order of their ids, after all others."""
    hidden, labels = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    weight = torch.tensor([[0.0], [-torch.inf], [2.0], [-torch.inf], [-torch.inf], [1.0]], dtype=torch.float64)
    for chunk in (1, 2, 4, 6):
        stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, 6), k=5, chunk=chunk)
        assert stats.topk_ids is not None and stats.topk_logp is not None
        assert stats.topk_ids.tolist() == [[2, 5, 0, 1, 3]] * 2
        assert (stats.topk_logp[:, 3:] == -torch.inf).all() and stats.topk_logp[:, :3].isfinite().all()


def test_union_of_lists() -> None:
    """Equal values on different shards, a shard that is short, and an order of shards that does not matter."""
    values = torch.tensor([[[3.0, 1.0, -torch.inf]], [[3.0, 3.0, 2.0]]])
    ids = torch.tensor([[[7, 2, 2**31 - 1]], [[10, 11, 12]]])
    for order in ([0, 1], [1, 0]):
        kept, kept_ids, lost = merge_largest(values[order], ids[order])
        assert kept.tolist() == [[3, 3, 3]] and kept_ids.tolist() == [[7, 10, 11]]
        assert lost.tolist() == [[2, 1, -torch.inf]]


def test_a_small_tail_is_exact() -> None:
    """In float32 a tail of e^-30 keeps its digits, where 1 - sum p would be 0."""
    logits = torch.zeros(1, 1000)
    logits[0, 400] = 37.0
    stats = linear_stats(logits, torch.eye(1000), torch.tensor([5]), shard=VocabShard(0, 1000), k=1, chunk=100)
    exact = torch.tensor(999.0).double().log() - 37
    assert stats.tail_logp is not None
    assert abs(stats.tail_logp.item() - exact.item()) < 1e-5
    # And with it the gradient: outside the list p_v / p_tail = 1 / 999.
    logits.requires_grad_()
    stats = linear_stats(logits, torch.eye(1000), torch.tensor([5]), shard=VocabShard(0, 1000), k=1, chunk=100)
    assert stats.tail_logp is not None
    stats.tail_logp.sum().backward()
    assert logits.grad is not None
    others = torch.cat([logits.grad[0, :400], logits.grad[0, 401:]])
    torch.testing.assert_close(others, torch.full((999,), 1 / 999), rtol=1e-5, atol=0)
    assert logits.grad[0, 400] == pytest.approx(-1, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_exact_as_the_dense_operator(dtype: torch.dtype) -> None:
    hidden, weight, labels = problem(dtype, n=128, v=1003)
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, 1003), k=20, chunk=128)
    assert stats.topk_ids is not None
    assert torch.equal(stats.topk_ids, reference.largest((hidden @ weight.t()).float(), 20))
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = dense(*exact_inputs, labels, stats.topk_ids, 1.0)
    plain = dense(hidden, weight, labels, stats.topk_ids, 1.0)
    truth = [*exact, *grads(exact, exact_inputs)]  # type: ignore[arg-type]
    theirs = [*plain, *grads(plain, (hidden, weight))]
    ours = [*outputs(stats), *grads(outputs(stats), (hidden, weight))]
    for mine, other, true in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - true).norm() < 1.2 * (other - true).norm()


@pytest.mark.parametrize("shard", [VocabShard(0, V), VocabShard(V, V)])
def test_no_tokens_still_give_gradients(shard: VocabShard) -> None:
    hidden, weight, labels = problem(n=0)
    for options in ({"k": 7}, {"indices": torch.empty(0, 7, dtype=torch.int64)}):
        if shard.size == 0 and "k" in options:
            continue  # a vocabulary of nothing has no 7 largest
        stats = linear_stats(hidden, weight, labels, shard=shard, chunk=100, **options)  # type: ignore[arg-type]
        assert stats.topk_logp is not None and stats.topk_logp.shape == (0, 7)
        (found,) = torch.autograd.grad(sum(x.sum() for x in outputs(stats)), weight)
        assert torch.equal(found, torch.zeros_like(weight))


class LargestStorage(TorchDispatchMode):
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
@pytest.mark.parametrize("given", [False, True])
def test_no_more_than_a_chunk_of_logits_exists(
    dtype: torch.dtype, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    n, v, chunk, k = 256, 1003, 64, 20
    hidden, weight, labels = problem(dtype, n=n, v=v)
    ids = torch.arange(k).expand(n, k) * 50
    with LargestStorage() as plain:
        sum(x.sum() for x in dense(hidden, weight, labels, ids, 1.0)).backward()
    assert plain.numel == n * v  # the watcher sees forward and backward
    options: dict[str, Any] = {"indices": ids} if given else {"k": k}
    with LargestStorage() as ours:
        stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, v), chunk=chunk, **options)
        sum(x.sum() for x in outputs(stats)).backward()
    assert ours.numel == n * chunk


def test_a_nan_stays_in_its_row() -> None:
    hidden, weight, labels = problem()
    broken = hidden.detach().clone()
    broken[3] = torch.nan
    stats, whole = (linear_stats(x, weight, labels, shard=VocabShard(0, V), k=5, chunk=50) for x in (broken, hidden))
    others = [row for row in range(N) if row != 3]
    for got, expected in zip(outputs(stats), outputs(whole)):
        assert torch.equal(got[others], expected[others]) and got[3].isnan().all()


def test_a_graph_that_is_kept_gives_the_same_gradient_again() -> None:
    hidden, weight, labels = problem()
    results = outputs(linear_stats(hidden, weight, labels, shard=VocabShard(0, V), k=5, chunk=50))
    for first, second in zip(grads(results, (hidden, weight)), grads(results, (hidden, weight)), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_places_are_those_of_a_stable_sort(dtype: torch.dtype) -> None:
    """With many equal values, both zeros, and no numbers at all."""
    values = torch.randint(-3, 4, (50, 200), generator=torch.Generator().manual_seed(0)).to(dtype) / 4
    values[:, ::7] = -0.0
    values[1::2, ::3] = -torch.inf
    values[0] = -torch.inf
    for k in (1, 20, 200):
        assert torch.equal(first_places(values, k), reference.largest(values, k))
    mixed = torch.tensor([[-0.0, 0.0, -1.5, 3e38, -torch.inf]], dtype=dtype)
    assert first_places(mixed, 5).tolist() == [[3, 0, 1, 2, 4]]


def test_lists_are_sorted_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of 8 over 400 chunks: once for each half of a list that may have changed, and the last time at the end."""
    logits, settle, full = draw(5, 6400), Largest.settle, []

    def counted(self: Largest) -> Any:
        full.append(self.values.shape[1] == self.k)
        return settle(self)

    monkeypatch.setattr(Largest, "settle", counted)
    lists = Largest(logits, 8)
    for start in range(0, 6400, 16):
        lists.take(logits[:, start : start + 16], slice(start, start + 16))
    lists.settle()
    expected = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(lists.values, expected.values[:, :8]) and torch.equal(lists.ids, expected.indices[:, :8])
    # Of 5 tokens the fastest decides; what enters is about 8 log(400) = 48 each, and more while the bound is old.
    assert 5 < len(full) < 50 and sum(full) == len(full) - 1
