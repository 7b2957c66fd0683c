"""Log-probability and entropy of labels, from hidden states and a vocabulary-sharded lm-head.

The logits z = h W^T / tau are never held: the vocabulary is streamed in chunks of columns, forward and backward. Per
token and shard the forward keeps a row of statistics,

    m = max z,   s = sum e^(z - m),   z_y (0 where another shard has the label),   r = sum (z - m) e^(z - m),

and one all-gather of these rows gives log Z = M + log S, log p_y = z_y - log Z and H = log S - R / S, where sums are
rebased to the common maximum M. (Top-k distillation adds k values and k indices to the same row.)

The backward needs no collective, as everything beside z is known on every rank:

    dL/dz_v = p_v (-g_lp - g_H (log p_v + H)) + [v = y] g_lp.

The gradient of `hidden` is this shard's part of the sum over the vocabulary: the operator that brought the hidden
states to every rank (copy or gather) adds the parts up.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_rl.ops.vocab_shard import VocabShard

# Elements of a chunk's buffer: on a CPU it should stay in the cache, on a GPU it should fill the machine.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**25}


class LinearStats(NamedTuple):
    """Per token [N]; float32, or float64 for float64 inputs. `entropy` is None if it was not asked for."""

    logp: Tensor
    entropy: Tensor | None


def linear_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    shard: VocabShard,
    temperature: float = 1.0,
    entropy: bool = True,
    chunk: int | None = None,
) -> LinearStats:
    """hidden [N, H], weight [rows >= shard.size, H], labels [N] int64 of the whole vocabulary.

    Differentiable in `hidden` and `weight`; rows beyond the shard's size are never read and get a zero gradient. With
    no tokens the result is empty and the gradients are zeros, so that the weight always has one. `chunk` is the number
    of vocabulary columns held at a time.
    """
    assert hidden.ndim == 2 and weight.shape[0] >= shard.size and labels.shape == hidden.shape[:1]
    if chunk is None:
        chunk = max(256, CHUNK_ELEMENTS[hidden.device.type] // max(1, hidden.shape[0]))
    logp, row_entropy = _LinearStats.apply(hidden, weight, labels, shard, temperature, entropy, chunk)
    return LinearStats(logp, row_entropy if entropy else None)


class _Logits:
    """Chunks of z in working precision, in buffers that are used again for every chunk."""

    def __init__(self, hidden: Tensor, weight: Tensor, temperature: float, chunk: int) -> None:
        self.hidden, self.weight, self.scale = hidden, weight, 1.0 / temperature
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        columns = min(chunk, weight.shape[0])
        self.product = hidden.new_empty(hidden.shape[0] * columns)
        same = self.dtype == hidden.dtype
        self.working = self.product if same else torch.empty_like(self.product, dtype=self.dtype)

    def columns(self, first: int, last: int) -> Tensor:
        """z[:, first:last]; the caller may overwrite it."""
        shape = (self.hidden.shape[0], last - first)
        size = shape[0] * shape[1]
        z = torch.mm(self.hidden, self.weight[first:last].T, out=self.product[:size].view(shape))
        if self.working is not self.product:
            z = self.working[:size].view(shape).copy_(z)
        return z if self.scale == 1.0 else z.mul_(self.scale)

    def as_input(self, dz: Tensor) -> Tensor:
        """A chunk's gradient in the inputs' dtype, for the products with them."""
        return dz if self.working is self.product else self.product[: dz.numel()].view(dz.shape).copy_(dz)


def _spans(size: int, chunk: int) -> list[tuple[int, int]]:
    return [(first, min(size, first + chunk)) for first in range(0, size, chunk)]


def _local_rows(logits: _Logits, labels: Tensor, shard: VocabShard, entropy: bool, chunk: int) -> Tensor:
    """This shard's statistics [N, 3] or [N, 4]: m, s, z_y, r."""
    tokens = labels.shape[0]
    # A shard of padding alone keeps this maximum: finite, so that products with its zero sums stay zero.
    m = torch.full((tokens,), torch.finfo(logits.dtype).min, dtype=logits.dtype, device=labels.device)
    s, z_y, r = torch.zeros_like(m), torch.zeros_like(m), torch.zeros_like(m)
    for first, last in _spans(shard.size, chunk):
        z = logits.columns(first, last)
        place, inside = shard.locate(labels, first, last)
        z_y = torch.where(inside, z.gather(1, place[:, None])[:, 0], z_y)
        largest = torch.maximum(m, z.amax(dim=1))
        shift = m - largest
        decay = shift.exp()
        z.sub_(largest[:, None])
        if entropy:
            e = z.exp()
            r = (r + torch.where(s > 0, shift, 0.0) * s) * decay + torch.linalg.vecdot(e, z)
        else:
            e = z.exp_()
        s = s * decay + e.sum(dim=1)
        m = largest
    return torch.stack([m, s, z_y, r] if entropy else [m, s, z_y], dim=1)


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        shard: VocabShard,
        temperature: float,
        entropy: bool,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logits = _Logits(hidden, weight, temperature, chunk)
        rows = shard.gather(_local_rows(logits, labels, shard, entropy, chunk))
        m, s = rows[..., 0], rows[..., 1]
        common = m.amax(dim=0)
        shift = m - common
        decay = shift.exp()
        total = (s * decay).sum(dim=0)
        log_z = common + total.log()
        logp = rows[..., 2].sum(dim=0) - log_z
        if entropy:
            rebased = (rows[..., 3] + torch.where(s > 0, shift, 0.0) * s) * decay
            row_entropy = total.log() - rebased.sum(dim=0) / total
        else:
            row_entropy = torch.empty_like(logp)
        ctx.save_for_backward(hidden, weight, labels, log_z, row_entropy)
        ctx.arguments = (shard, temperature, entropy, chunk)
        return logp, row_entropy

    @staticmethod
    def backward(ctx: Any, g_logp: Tensor, g_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_z, row_entropy = ctx.saved_tensors
        shard, temperature, entropy, chunk = ctx.arguments
        with_entropy = entropy and bool((g_entropy != 0).any())
        logits = _Logits(hidden, weight, temperature, chunk)
        # Every row is written once, so its gradient is never accumulated in low precision.
        d_weight = torch.empty_like(weight)
        d_weight[shard.size :].zero_()
        d_hidden = torch.zeros(hidden.shape, dtype=logits.dtype, device=hidden.device)
        for first, last in _spans(shard.size, chunk):
            log_p = logits.columns(first, last).sub_(log_z[:, None])
            if with_entropy:
                constant = -g_logp - g_entropy * row_entropy
                factor = torch.addcmul(constant[:, None], log_p, -g_entropy[:, None])
                dz = log_p.exp_().mul_(factor)
            else:
                dz = log_p.exp_().mul_(-g_logp[:, None])
            place, inside = shard.locate(labels, first, last)
            dz.scatter_add_(1, place[:, None], torch.where(inside, g_logp, 0.0)[:, None])
            if temperature != 1.0:
                dz.mul_(1.0 / temperature)
            low = logits.as_input(dz)
            torch.mm(low.T, hidden, out=d_weight[first:last])
            d_hidden += low @ weight[first:last]
        return d_hidden.to(hidden.dtype), d_weight, None, None, None, None, None
