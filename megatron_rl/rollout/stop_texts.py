"""Ending responses at texts, which may span several tokens or end inside one."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

# Characters before a stop text that a window of tokens holds as well: where it cuts a word or a character in two, the
# text there is not that of the whole response.
MARGIN = 8

Decode = Callable[[Sequence[int]], str]


class StopTexts(StoppingCriteria):
    """Ends a row at the first token after which its decoded response holds one of `texts`.

    `ends[row]` is then the number of tokens up to there, that one included. Each row is looked at by itself. A row that
    has drawn one of `stop`, the ids that end a response, is over. Responses begin after `width` tokens.
    """

    def __init__(self, texts: Collection[str], decode: Decode, *, stop: Collection[int], width: int, rows: int) -> None:
        self.texts, self.decode, self.stop, self.width = texts, decode, stop, width
        self.drawn: list[list[int]] = [[] for _ in range(rows)]
        self.ends: list[int | None] = [None] * rows
        self.over = [False] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.over[row]:
                continue
            self.drawn[row].append(token)
            if token in self.stop:
                self.over[row] = True
            elif holds_at_end(self.drawn[row], self.texts, self.decode):
                self.over[row], self.ends[row] = True, len(self.drawn[row])
        return torch.tensor(self.over, device=input_ids.device)


def holds_at_end(tokens: Sequence[int], texts: Collection[str], decode: Decode) -> bool:
    """Whether the decoded tokens hold one of `texts`, which they did not without the last token.

    The last tokens are decoded first, as many as the longest text with a margin needs: most of the time they settle it.
    """
    reach = max(map(len, texts)) + MARGIN
    count = reach
    while len(tail := decode(tokens[-count:])) < reach and count < len(tokens):
        count *= 2
    return any(text in tail for text in texts) and any(text in decode(tokens) for text in texts)
