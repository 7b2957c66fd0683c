"""The weight's gradient, added to a tensor that the operators are given."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_rl.ops import logit_stream
from megatron_rl.ops.divergence import Head, full_divergence, paired_stats
from megatron_rl.ops.linear_stats import linear_stats
from megatron_rl.ops.vocab_shard import VocabShard
from tests.unit.test_linear_stats import Largest

N, H, V, PADDING = 29, 13, 157, 3
SHARD = VocabShard(0, V)
LABELS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(3))


def of_tokens(head: Head) -> Tensor:
    options = {"shard": SHARD, "temperature": head.temperature, "chunk": 50, "main_grad": head.main_grad}
    stats = linear_stats(head.hidden, head.weight, LABELS[: len(head.hidden)], **options)  # type: ignore[arg-type]
    assert stats.entropy is not None
    return stats.logp.sum() - 0.3 * stats.entropy.sum()


def of_lists(head: Head, support: str) -> Tensor:
    teacher = Head(head.hidden + 1, head.weight.flip(1))
    pair = paired_stats(head, teacher, LABELS, support=support, k=4, shard=SHARD, chunk=50)  # type: ignore[arg-type]
    assert pair.student.topk_logp is not None
    return pair.student.topk_logp.square().sum()


def of_all(head: Head) -> Tensor:
    teacher = Head(head.hidden + 1, head.weight.flip(1))
    return full_divergence(head, teacher, LABELS, alpha=0.3, shard=SHARD, chunk=50).loss.sum()


LOSSES = {
    "stats": of_tokens,
    "student": lambda head: of_lists(head, "student"),
    "teacher": lambda head: of_lists(head, "teacher"),
    "full": of_all,
}


def tensors(dtype: torch.dtype, n: int = N, v: int = V) -> tuple[Tensor, Tensor]:
    """Hidden states, and a weight with padding that only a wrong read would show."""
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(size, H, generator=generator).to(dtype) for size in (n, v + PADDING))
    weight[v:] = torch.nan
    return hidden.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("kept", [True, False])
def test_it_is_what_the_weight_would_get(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On top of what the tensor holds, twice, and the weight gets nothing; the padding is left as it is."""
    if not kept:
        monkeypatch.setattr(logit_stream, "KEPT_BYTES", 0)
    loss: Callable[[Head], Tensor] = LOSSES[name]
    hidden, weight = tensors(torch.float64)
    expected = torch.autograd.grad(loss(Head(hidden, weight, 0.7)), (hidden, weight))
    before = torch.arange(1.0, 1 + weight.numel(), dtype=torch.float64).view_as(weight)
    main_grad = before.clone()
    for _ in range(2):
        loss(Head(hidden, weight, 0.7, main_grad)).backward()
    assert weight.grad is None and hidden.grad is not None
    torch.testing.assert_close(hidden.grad, 2 * expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(main_grad[:V], (before + 2 * expected[1])[:V], rtol=0, atol=1e-11)
    assert torch.equal(main_grad[V:], before[V:])


def test_in_bfloat16_it_keeps_float32() -> None:
    """Sixty-four small gradients on a large one, each of which is below the resolution of bfloat16 there."""
    hidden, weight = tensors(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    (slope,) = torch.autograd.grad(of_tokens(Head(*exact)), exact[1])
    main_grad = torch.full_like(weight, 4096.0, dtype=torch.float32)
    for _ in range(64):
        of_tokens(Head(hidden, weight, main_grad=main_grad)).backward()
    truth = 4096 + 64 * slope[:V]
    assert (main_grad[:V] - truth).norm() < 0.02 * (64 * slope[:V]).norm()
    assert (truth.bfloat16() - truth).norm() > 0.05 * (64 * slope[:V]).norm()


class Made(Largest):
    """Of what an operator makes, and not of views into what was there."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def _sizes(self, result: Any) -> Iterator[int]:  # type: ignore[override]
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        return super()._sizes([leaf for leaf in leaves if leaf.untyped_storage().data_ptr() not in self.known])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_of_the_weights_size_is_made(dtype: torch.dtype) -> None:
    hidden, weight = tensors(dtype, n=N, v=V)
    main_grad = torch.zeros_like(weight, dtype=torch.float32)
    sizes = {}
    for name, head in (("returned", Head(hidden, weight)), ("added", Head(hidden, weight, main_grad=main_grad))):
        loss = of_tokens(head)
        with Made(weight, main_grad) as made:
            torch.autograd.grad(loss, hidden)
        sizes[name] = made.numel
    # Of the rest the largest is a chunk of logits.
    assert sizes == {"returned": weight.numel(), "added": N * 50}


def test_without_tokens_nothing_is_added() -> None:
    hidden, weight = tensors(torch.float32, n=0)
    main_grad = torch.zeros_like(weight)
    of_tokens(Head(hidden, weight, main_grad=main_grad)).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, H) and not main_grad.any()
