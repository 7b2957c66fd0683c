"""Where responses end: at a token, or at a text, which may span several tokens or end inside one."""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

# Characters before a stop text that a window of tokens holds as well: where it cuts a word or a character in two, the
# text there is not that of the whole response.
MARGIN = 8

Decode = Callable[[Sequence[int]], str]


class Ending:
    """Which answers of a batch are over, row by row: by one of the ids `stop`, or by one of `texts`.

    A row ends at the first token after which its decoded response holds a text; `ends[row]` is then the number of
    tokens up to there, that one included.
    """

    def __init__(self, texts: Collection[str], decode: Decode, *, stop: Collection[int], rows: int) -> None:
        self.texts, self.decode, self.stop = texts, decode, torch.tensor(list(stop), dtype=torch.int64)
        self.drawn: list[list[int]] = [[] for _ in range(rows)]
        self.ends: list[int | None] = [None] * rows
        self.over = [False] * rows

    def __call__(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Whether each of `rows` is over with its next token, of `tokens` [len(rows)]; a row may come once more."""
        over = torch.isin(tokens, self.stop.to(tokens.device))
        if not self.texts:
            return over
        for row, token, by_token in zip(rows, tokens.tolist(), over.tolist()):
            if self.over[row]:
                continue
            self.drawn[row].append(token)
            if not by_token and holds_at_end(self.drawn[row], self.texts, self.decode):
                self.ends[row] = len(self.drawn[row])
            self.over[row] = by_token or self.ends[row] is not None
        return torch.tensor([self.over[row] for row in rows], device=tokens.device)


def holds_at_end(tokens: Sequence[int], texts: Collection[str], decode: Decode) -> bool:
    """Whether the decoded tokens hold one of `texts`, which they did not without the last token.

    The last tokens are decoded first, as many as the longest text with a margin needs: most of the time they settle it.
    """
    reach = max(map(len, texts)) + MARGIN
    count = reach
    while len(tail := decode(tokens[-count:])) < reach and count < len(tokens):
        count *= 2
    return any(text in tail for text in texts) and any(text in decode(tokens) for text in texts)
