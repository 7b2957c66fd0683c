"""Expert iteration: which of its own answers a model learns."""

from dataclasses import dataclass
from enum import StrEnum


class Keep(StrEnum):
    """The answers that are learned: all correct ones, or the best of each group."""

    correct = "correct"
    top = "top"


@dataclass(kw_only=True)
class ExpertConfig:
    """Answers that were cut off at the limit, or could not be judged, are never kept."""

    keep: Keep = Keep.correct
    top_k: int | None = None  # of keep=top: answers of a group at most
    min_tokens: int = 4  # shorter answers are not kept; the token that ends one counts
    deduplicate: bool = True  # the same tokens after the same prompt are kept once
