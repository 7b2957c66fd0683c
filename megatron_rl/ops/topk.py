"""Entries of a stream of logits: the k largest of each token, or those at given ids.

The k largest are so under a total order, value first and then the smaller id, so that chunks and shards do not show:
with logits in bfloat16 the k-th and the (k+1)-th are equal for many tokens. The stream visits ids in ascending order.
A later column hence enters a full list only if it is strictly larger than the last entry, and a stable sort of the list
followed by what enters is the order itself. What enters waits, and a list is sorted once half of it may have changed:
over V columns in chunks of C a few times log(V / C) instead of V / C. The work left is a comparison.
"""

from typing import NamedTuple

import torch
from torch import Tensor

NO_ID = 2**31 - 1  # of an empty place in a list; larger than every id
BLOCK = 64  # columns that are left out together where their maximum does not enter


class Taken(NamedTuple):
    """What a chunk of logits gave to a list."""

    rows: Tensor  # [M] tokens, and
    columns: Tensor  # [M] columns of the chunk, of the entries that were taken out of it
    lost: "Lost | None" = None


class Lost(NamedTuple):
    """Entries, of this chunk or of earlier ones, that fell out of their lists."""

    rows: Tensor  # [R] tokens, and
    values: Tensor  # [R, m] their logits; -inf for none


class Largest:
    """The k largest logits of each token so far, and their ids; in order once nothing waits."""

    def __init__(self, like: Tensor, k: int) -> None:
        self.k = k
        self.values = like.new_empty(like.shape[0], 0)
        self.ids = torch.empty_like(self.values, dtype=torch.int64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # tokens, ids and logits of what entered since
        self._counts = self.ids.new_zeros(like.shape[0])  # of what waits

    def take(self, logits: Tensor, columns: slice) -> Taken:
        """Enters a chunk, whose ids are larger than all before."""
        full = self.values.shape[1] == self.k
        row, column, value = self._entries(logits, full)
        lost = None
        if len(row):
            self._waiting.append((row, column + columns.start, value))
            self._counts += row.bincount(minlength=len(logits))
            if not full or 2 * int(self._counts.max()) > self.k:
                lost = self.settle()
        return Taken(row, column, lost)

    def settle(self) -> Lost | None:
        """Sorts what waits into the lists."""
        if not self._waiting:
            return None
        row, ids_in, value = (torch.cat(parts) for parts in zip(*self._waiting))
        if len(self._waiting) > 1:
            row, order = row.sort(stable=True)
            ids_in, value = ids_in[order], value[order]
        full, counts = self.values.shape[1] == self.k, self._counts
        rows = (counts if full else torch.ones_like(counts)).nonzero()[:, 0]
        nth = torch.arange(len(row), device=row.device).sub_((counts.cumsum(0) - counts)[row])
        place = (torch.searchsorted(rows, row), nth)
        values = torch.cat([self.values[rows], value.new_full((len(rows), int(counts.max())), -torch.inf)], 1)
        ids = torch.cat(
            [self.ids[rows], torch.full_like(values[:, self.values.shape[1] :], NO_ID, dtype=torch.int64)], 1
        )
        values[:, self.values.shape[1] :][place] = value
        ids[:, self.values.shape[1] :][place] = ids_in
        self._waiting, self._counts = [], torch.zeros_like(counts)
        del place, nth, value, ids_in
        values, order = values.sort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        width = min(self.k, values.shape[1])
        if full:
            self.values[rows], self.ids[rows] = values[:, :width], ids[:, :width]
        else:
            self.values, self.ids = values[:, :width].contiguous(), ids[:, :width].contiguous()
        return Lost(rows, values[:, width:].clone())

    def _entries(self, logits: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, columns, logits) of what enters, at most 2 k of a token that do not tie; only blocks whose maximum
        enters are looked into.
        """
        # What enters is larger than a full list's last, or else among the chunk's own largest.
        bound = self.values[:, -1] if full else logits.topk(min(self.k, logits.shape[1])).values[:, -1]
        blocks = logits.unflatten(1, (-1, BLOCK if logits.shape[1] % BLOCK == 0 else logits.shape[1]))
        of, block = _enters(blocks.amax(2), bound[:, None], full).nonzero().unbind(1)
        found = blocks[of, block]
        place, inside = _enters(found, bound[of, None], full).nonzero().unbind(1)
        row, column, value = of[place], block[place] * blocks.shape[2] + inside, found[place, inside]
        if len(row) and 2 * self.k < int(row.bincount().max()):
            stays = _enters(value, logits.topk(self.k).values[row, -1], False)
            row, column, value = row[stays], column[stays], value[stays]
        return row, column, value


def _enters(values: Tensor, bound: Tensor, full: bool) -> Tensor:
    """A list that is not full takes what equals the bound, and nan too."""
    return values > bound if full else ~(values < bound)


def first_places(values: Tensor, k: int) -> Tensor:
    """Where the k largest of each row [N, M] stand: by value, then by the smaller place; without a synchronisation.

    float32 and place are packed into one integer each: the bits of a number, the others flipped if it is negative, are
    in its order.
    """
    if values.dtype == torch.float64:
        return values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # -0.0 + 0.0 is 0.0, whose bits are others.
    bits = (values + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    places = torch.arange(values.shape[1], device=values.device)
    keys = (ordered << 32) | (0xFFFFFFFF - places)
    return 0xFFFFFFFF - (keys.topk(k, 1).values & 0xFFFFFFFF)


def merge_largest(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N, k], ids [N, k], values that lost [N, (P - 1) k]) of the union of P lists [P, N, k]."""
    k = values.shape[-1]
    values, ids = (x.transpose(0, 1).flatten(1) for x in (values, ids))
    ids, by_id = ids.sort(1)
    values, by_value = values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, by_value)[:, :k], values[:, k:]


class Places:
    """Where given ids [N, k] lie in the chunks of a shard: sorted once, so that a chunk sees its own only."""

    def __init__(self, local_ids: Tensor, size: int, chunk: int) -> None:
        self.k, self.chunk = local_ids.shape[1], chunk
        self._ids, self._flat = local_ids.flatten().sort()
        edges = torch.arange(0, size + chunk, chunk, device=local_ids.device).clamp(max=size)
        self._edges = torch.searchsorted(self._ids, edges).tolist()

    def within(self, columns: slice) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, places in their lists, columns of the chunk), each [M]."""
        number = columns.start // self.chunk
        inside = slice(self._edges[number], self._edges[number + 1])
        flat = self._flat[inside]
        return flat // self.k, flat % self.k, self._ids[inside] - columns.start


class Given:
    """The logits at given ids; 0 where the shard does not hold them."""

    def __init__(self, like: Tensor, places: Places) -> None:
        self.values = like.new_zeros(like.shape[0], places.k)
        self._places = places

    def take(self, logits: Tensor, columns: slice) -> Taken:
        rows, places, inside = self._places.within(columns)
        self.values[rows, places] = logits[rows, inside]
        return Taken(rows, inside)
