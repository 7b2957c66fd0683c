"""Which samples share a micro-batch, and on which data-parallel rank.

The plan only packs. It holds every sample once, splits none, keeps the token budget, and gives every rank the same
number of micro-batches; fillers `()` make up the number. What a token weighs in the loss is decided before, so any
plan of the same samples gives the same gradient.

Method: longest first, each sample goes to the emptiest micro-batch of all ranks. If it does not fit there it fits
nowhere, so we start again with more micro-batches. Two bounds follow, and the tests hold us to them:

* Number. With B micro-batches in all, a failure means that the samples fill more than B * max_tokens / 2. So a rank
  never gets more than `ceil(2 * total / (dp_size * max_tokens))` micro-batches, before the minimum and the multiple.
* Balance. The fullest and the emptiest micro-batch differ by at most one longest sample. Ranks take them in order of
  size, so the differences between ranks, summed over the whole step, stay below one longest sample too.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """`micro_batches[rank][m]` holds the indices of the samples in that rank's m-th micro-batch."""

    micro_batches: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        return len(self.micro_batches[0])


def plan_step(
    lengths: Sequence[int], *, dp_size: int, max_tokens: int, min_micro_batches: int = 1, multiple_of: int = 1
) -> StepPlan:
    """Pack samples of these lengths into as few equal-sized rounds of `dp_size` micro-batches as the method finds.

    `min_micro_batches` is the pipeline size; `multiple_of` is the pipeline size under virtual pipelining.
    """
    assert dp_size >= 1 and min_micro_batches >= 1 and multiple_of >= 1, (dp_size, min_micro_batches, multiple_of)
    assert all(length >= 1 for length in lengths), "a sample has at least one token"
    _check_fits(lengths, max_tokens)
    fewest = max(min_micro_batches, _ceil_div(_fewest_bins(lengths, max_tokens), dp_size))
    rounds = _ceil_div(fewest, multiple_of) * multiple_of
    while (bins := _pack(lengths, dp_size * rounds, max_tokens)) is None:
        rounds += multiple_of

    sizes = [sum(lengths[i] for i in members) for members in bins]
    largest_first = sorted(range(len(bins)), key=lambda b: (-sizes[b], bins[b]))
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(dp_size)]
    for m in range(rounds):
        peers = largest_first[m * dp_size : (m + 1) * dp_size]
        # Turning every second round keeps one rank from always taking the largest.
        for rank, b in enumerate(peers if m % 2 == 0 else reversed(peers)):
            ranks[rank].append(bins[b])
    return StepPlan(tuple(tuple(rank) for rank in ranks))


def replan(
    lengths: Sequence[int], plan: StepPlan, *, max_tokens: int, min_micro_batches: int = 1, multiple_of: int = 1
) -> StepPlan:
    """Pack the samples of `plan` with other lengths; each stays on the rank that it has there."""
    _check_fits(lengths, max_tokens)
    members = [[index for indices in rank for index in indices] for rank in plan.micro_batches]
    rounds = _ceil_div(min_micro_batches, multiple_of) * multiple_of
    while True:
        packed = [_pack([lengths[index] for index in rank], rounds, max_tokens) for rank in members]
        if all(bins is not None for bins in packed):
            break
        rounds += multiple_of
    return StepPlan(
        tuple(
            tuple(tuple(rank[place] for place in places) for places in bins or ())
            for rank, bins in zip(members, packed, strict=True)
        )
    )


def _fewest_bins(lengths: Sequence[int], max_tokens: int) -> int:
    """No plan has fewer micro-batches: by the tokens, by the samples of more than half a micro-batch, which share
    none with each other, and by the number that fits if all were as short as the shortest. So we need not try them."""
    together = max_tokens // min(lengths, default=1)
    halves = sum(2 * length > max_tokens for length in lengths)
    return max(_ceil_div(sum(lengths), max_tokens), halves, _ceil_div(len(lengths), together))


def _check_fits(lengths: Sequence[int], max_tokens: int) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: a micro-batch must be allowed at least one token")
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise ValueError(
                f"sample {index} has {length} tokens and a micro-batch may hold max_tokens={max_tokens}; sequences are "
                f"never split, so raise max_tokens to at least {max(lengths)}, or allow shorter prompts and responses"
            )


def _pack(lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[tuple[int, ...]] | None:
    """Longest sample first into the emptiest bin; None if one does not fit. Ties go to the lowest index."""
    members: list[list[int]] = [[] for _ in range(num_bins)]
    emptiest = [(0, b) for b in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size, b = emptiest[0]
        if size + lengths[index] > max_tokens:
            return None
        members[b].append(index)
        heapq.heapreplace(emptiest, (size + lengths[index], b))
    return [tuple(sorted(indices)) for indices in members]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
