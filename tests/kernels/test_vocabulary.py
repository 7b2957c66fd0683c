"""Whole operators through the kernels, forward and backward, against the torch path in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.ops import dispatch, logit_stream
from megatron_rl.ops.divergence import Head, full_divergence, paired_stats
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.summary import torch_part
from megatron_rl.ops.vocab_shard import VocabShard
from tests.kernels.exact import DTYPES, TOLERANCE, check, head, sizes

Arrays = list[Tensor]


def through(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, kernels)


def weighted(numbers: Arrays) -> Tensor:
    """One loss of all of them, each entry with its own weight."""
    weights = [torch.arange(1, 1 + x.numel(), device=x.device).view_as(x) % 7 / 3 - 1 for x in numbers]
    return sum(((x * w.to(x.dtype)).sum() for x, w in zip(numbers, weights)), start=numbers[0].new_zeros(()))


def stats_and_gradients(n: int, v: int, dtype: torch.dtype, device: torch.device, listed: int, **options: Any) -> Any:
    """(statistics, gradients, the most likely ids)."""
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in head(n, v, seed=0))
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, v, (n,), generator=generator).to(device)
    ids = torch.rand(n, v, generator=generator).topk(listed).indices.to(device) if listed else None
    stats = linear_stats(hidden, weight, labels, shard=VocabShard(0, v), temperature=0.7, indices=ids, **options)
    numbers = [x for x in (stats.logp, stats.entropy, stats.topk_logp, stats.tail_logp) if x is not None]
    return numbers, list(torch.autograd.grad(weighted(numbers), (hidden, weight))), stats.largest_ids


@pytest.mark.parametrize(
    "options",
    [
        {"entropy": False, "listed": 0},
        {"entropy": True, "listed": 0, "k": 5},
        {"entropy": False, "listed": 3},
        {"entropy": True, "listed": 3, "k": 5},
    ],
    ids=lambda options: "-".join(f"{name}{value}" for name, value in options.items()),
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, v = sizes(device)
    if dtype == torch.float32:
        monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)  # the logits are computed again
    through("triton", monkeypatch)
    numbers, gradients, largest = stats_and_gradients(n, v, dtype, device, chunk=50, **options)
    through("torch", monkeypatch)
    expected, slopes, ids = stats_and_gradients(n, v, torch.float64, torch.device("cpu"), chunk=1024, **options)
    of_numbers, of_gradients = TOLERANCE[dtype]
    check(numbers, expected, of_numbers)
    check(gradients, slopes, of_gradients)
    assert ids is None or torch.equal(largest.cpu(), ids)
    assert not gradients[1][v:].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_that_are_added(device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both operators' weights, to a tensor of ones."""
    n, v = sizes(device)

    def slopes(place: torch.device, dtype: torch.dtype) -> Arrays:
        tensors = [x.to(place, dtype).requires_grad_() for seed in (0, 2) for x in head(n, v, seed)]
        main_grad = torch.ones_like(tensors[1], dtype=torch.promote_types(dtype, torch.float32))
        labels, shard = torch.zeros(n, dtype=torch.int64, device=place), VocabShard(0, v)
        linear_stats(*tensors[:2], labels, shard=shard, chunk=50, main_grad=main_grad).logp.sum().backward()
        student = Head(*tensors[:2], main_grad=main_grad)
        full_divergence(student, Head(*tensors[2:]), labels, alpha=0.3, shard=shard, chunk=64).loss.sum().backward()
        assert tensors[1].grad is None
        return [main_grad, tensors[0].grad]

    through("triton", monkeypatch)
    found = slopes(device, dtype)
    through("torch", monkeypatch)
    check(found, slopes(torch.device("cpu"), torch.float64), TOLERANCE[dtype][1])


def divergence_and_gradients(n: int, v: int, dtype: torch.dtype, device: torch.device, alpha: float) -> Any:
    tensors = [x.to(device, dtype).requires_grad_() for seed in (0, 2) for x in head(n, v, seed)]
    student, teacher = Head(*tensors[:2], 0.9), Head(*tensors[2:], 1.1)
    labels = torch.randint(0, v, (n,), generator=torch.Generator().manual_seed(1)).to(device)
    result = full_divergence(student, teacher, labels, alpha=alpha, k=3, shard=VocabShard(0, v), chunk=64)
    stats = result.pair.student
    assert stats.entropy is not None and result.pair.teacher.entropy is not None
    numbers = [result.loss, stats.logp, stats.entropy]
    gradients = torch.autograd.grad(weighted(numbers), tensors[:2])
    return [*numbers, result.pair.teacher.logp, result.pair.teacher.entropy], list(gradients)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_divergence(device: torch.device, dtype: torch.dtype, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, v = sizes(device)
    if dtype == torch.float32:
        monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    through("triton", monkeypatch)
    numbers, gradients = divergence_and_gradients(n, v, dtype, device, alpha)
    through("torch", monkeypatch)
    expected, slopes = divergence_and_gradients(n, v, torch.float64, torch.device("cpu"), alpha)
    of_numbers, of_gradients = TOLERANCE[dtype]
    check(numbers, expected, of_numbers)
    check(gradients, slopes, of_gradients)


def test_a_teacher_at_the_ids_of_the_student(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPO's lists with their tail: both heads at the student's most likely ids."""
    n, v = sizes(device)

    def stats(place: torch.device, dtype: torch.dtype) -> tuple[Arrays, Arrays]:
        tensors = [x.to(place, dtype).requires_grad_() for seed in (0, 2) for x in head(n, v, seed)]
        pair = paired_stats(
            Head(*tensors[:2]),
            Head(*tensors[2:]),
            torch.zeros(n, dtype=torch.int64, device=place),
            support="student",
            k=5,
            shard=VocabShard(0, v),
            figures=False,
        )
        lists = [x for head in pair for x in (head.topk_logp, head.tail_logp) if x is not None]
        assert len(lists) == 4
        s, s_tail, t, t_tail = lists
        kl = (s.exp() * (s - t)).sum(1) + s_tail.exp() * (s_tail - t_tail)
        return [*lists, kl], list(torch.autograd.grad(weighted([kl]), tensors[:2]))

    through("triton", monkeypatch)
    numbers, gradients = stats(device, torch.float32)
    through("torch", monkeypatch)
    expected, slopes = stats(torch.device("cpu"), torch.float64)
    check(numbers, expected, 2e-5)
    check(gradients, slopes, 2e-5)


@pytest.mark.parametrize(("start", "stop"), [(0, 70), (70, 157), (154, 157), (157, 157)])
def test_a_shard_of_the_vocabulary(device: torch.device, start: int, stop: int) -> None:
    """Labels and listed ids that lie elsewhere, more to be listed than there are columns, and no columns at all."""
    from megatron_rl.ops.triton.rows import shard_part

    hidden, weight = head(4, 157, seed=0, padding=0)
    labels = torch.tensor([0, 69, 70, 156]) - start
    indices = torch.tensor([[0, 69, 70], [156, 5, 71], [68, 155, 1], [80, 90, 100]]) - start
    for ids in (None, indices):
        for k in (0, 7):
            options: dict[str, Any] = {"temperature": 0.7, "entropy": True, "k": k, "chunk": 16, "kept": None}
            expected = torch_part(hidden, weight[start:stop], labels, ids, **options)
            local = [x if x is None else x.to(device) for x in (hidden, weight[start:stop], labels, ids)]
            for result, value in zip(shard_part(*local, **options), expected, strict=True):
                assert (result is None) == (value is None)
                if value is not None:
                    torch.testing.assert_close(result.cpu(), value, rtol=1e-12, atol=1e-12)


def test_without_tokens(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    through("triton", monkeypatch)
    numbers, gradients, ids = stats_and_gradients(0, 157, torch.float32, device, 0, k=3)
    assert ids.shape == (0, 3) and all(len(x) == 0 for x in numbers)
    assert gradients[0].shape == (0, 8) and not gradients[1].any()


def test_a_second_backward_pass_is_the_first(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first writes gradients over the logits that were kept."""
    through("triton", monkeypatch)
    student, teacher = (Head(*(x.to(device).requires_grad_() for x in head(4, 40, seed))) for seed in (0, 2))
    labels, shard = torch.zeros(4, dtype=torch.int64, device=device), VocabShard(0, 40)
    stats = linear_stats(student.hidden, student.weight, labels, shard=shard, k=3, chunk=16)
    assert stats.topk_logp is not None
    divergence = full_divergence(student, teacher, labels, alpha=0.5, shard=shard, chunk=16).loss
    for loss in (stats.topk_logp.sum(), divergence.sum()):
        first, second = (torch.autograd.grad(loss, student[:2], retain_graph=True) for _ in range(2))
        for x, y in zip(first, second):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
