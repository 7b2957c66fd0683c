"""The sections of trainers that have a critic."""

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_rl.config.optim import OptimConfig


class Pooling(StrEnum):
    """From the values of a response's tokens to its score; see algorithms/pooling.py."""

    last_token = "last_token"
    mean = "mean"
    mean_no_eos = "mean_no_eos"


@dataclass(kw_only=True)
class CriticConfig:
    """A second model, under a scalar head, on the ranks and in the precision of the first."""

    path: str | None = None  # Hugging Face directory with the policy's tokenizer; null: model.path
    weights: str | None = None  # as model.weights, and null the same; a language model's come under a new head
    optim: OptimConfig = field(default_factory=OptimConfig)


@dataclass(kw_only=True)
class PpoOptions:
    """From rewards and values of tokens to advantages and returns, and what the critic makes of these; docs/ppo.md."""

    gamma: float = 1.0  # discount per token
    lam: float = 1.0  # of generalized advantage estimation: 1 trusts rewards, 0 the critic
    value_clip: float | None = 0.5  # how far an update may move a value and still learn from it; null: no bound
    whiten: bool = True  # advantages of a rollout batch have mean 0 and variance 1
    critic_warmup: int = 0  # first steps, in which the critic learns alone


@dataclass(kw_only=True)
class DiscriminatorConfig:
    """How responses of teacher and policy are scored and told apart; see docs/gad.md."""

    pooling: Pooling = Pooling.mean_no_eos
    append_eos: bool = True  # the teacher's responses end with the token that the policy's end with
    raw_weight: float = 1.0  # of the score
    norm_weight: float = 0.0  # of the score divided by the length
    debias_length: bool = False  # take out of scores and rewards what their length explains
    batch_norm: bool = False  # scores of a batch have mean 0 and variance 1 in the loss
    temperature: float = 1.0
    adaptive_temperature: list[float] | None = None  # offset, slope, low, high; see the docs
    label_smoothing: float = 0.0
    l2: float = 0.0  # times the mean square of the scores
    range_penalty: float = 0.0  # times the squared distance of scores to [range_low, range_high]
    range_low: float = 0.0
    range_high: float = 10.0
    sft_steps: int = 0  # first, the policy learns the teacher's responses, while the critic learns to tell
    warmup_steps: int = 0  # then, steps in which only the critic learns
    reward_weight: float = 0.0  # of the rule-based reward, added to the score; a reward of format, say
