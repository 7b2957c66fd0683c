"""What an engine is: it takes weights, and answers prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_rl.types import Prompt, RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy.

    `seed` and `stream` key the random numbers, beside the prompt's place in the call and the response's in its group:
    a training step is a stream, and so is an evaluation. A call that goes on where others ended says in `first` how
    many prompts those had. The same keys give the same draws whatever is generated together.

    A response ends with the first of the texts in `stop` that it holds, and keeps it.
    """

    group_size: int
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int
    stream: tuple[int, ...]
    first: int = 0


class Engine(Protocol):
    """Both verbs are collective: every rank calls them, with the same arguments."""

    version: int
    """Updates the engine's weights have had; -1 before the first load."""

    dtype: torch.dtype
    """What the engine holds its weights in."""

    device: torch.device
    """Where it takes their checksums."""

    takes: bool
    """Whether it takes the tensors of this rank, or another's."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Takes every tensor of the model, by its Hugging Face name."""

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """The `checksum` of each named tensor as this rank's engine holds it."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """One group per prompt, in order, on every rank."""

    def close(self) -> None:
        """Gives back what it holds beside this process's memory."""


class Drawing(Protocol):
    """Answers that are being drawn."""

    seconds: float
    """How long that took, once they are there."""

    def groups(self) -> list[RolloutGroup]:
        """Waits for them; on every rank. Collective."""


class OverlappingEngine(Engine, Protocol):
    """One that answers while the trainer does other work. New weights wait until it has answered."""

    def start(self, prompts: Sequence[Prompt], sampling: Sampling) -> Drawing:
        """`generate`, without waiting. Collective."""
