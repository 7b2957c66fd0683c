"""The sections that self-distillation has beside those of every policy trainer."""

from dataclasses import dataclass
from enum import StrEnum

from megatron_rl.config.average import AverageConfig


class DistillLoss(StrEnum):
    """What of the teacher is learned: its next-token distribution, or its judgement of the drawn token."""

    logits = "logits"
    sampled_token = "sampled_token"


class Support(StrEnum):
    """Whose most likely ids are compared; `full`: all of them."""

    student = "student"
    teacher = "teacher"
    full = "full"


class Tail(StrEnum):
    """What becomes of the ids that are not listed; see algorithms/distill.py."""

    exact = "exact"
    clamped = "clamped"
    none = "none"


class TeacherMode(StrEnum):
    """What the teacher's weights are: an average of the policy's, a mixture of the first policy's and the present one's
    logits, the first policy, or the present one."""

    ema = "ema"
    trust_region = "trust_region"
    frozen = "frozen"
    live = "live"


class TeacherUpdate(StrEnum):
    """When an averaged teacher moves: after a rollout batch, or after each optimizer step; only if one was applied."""

    rollout = "rollout"
    step = "step"


class Choice(StrEnum):
    """Which of several successful siblings a teacher is shown."""

    first = "first"
    random = "random"
    shortest = "shortest"


class Feedback(StrEnum):
    """When the environment's feedback is shown."""

    never = "never"
    without_solution = "without_solution"
    always = "always"


class Overlong(StrEnum):
    """What happens to a teacher's prompt longer than `reprompt.max_tokens`: its evidence is cut, or it is refused."""

    shrink = "shrink"
    error = "error"


class SuccessWeighting(StrEnum):
    """How a response's distillation depends on successes; see algorithms/distill.py.

    `failed`: only responses that did not succeed have a target. `pass_rate`: questions that are sometimes answered
    right count most.
    """

    none = "none"
    failed = "failed"
    pass_rate = "pass_rate"


@dataclass(kw_only=True)
class DistillConfig:
    loss: DistillLoss = DistillLoss.logits
    support: Support = Support.student
    topk: int = 100  # ids per token; the vocabulary's size at most
    alpha: float = 0.5  # 0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon
    tail: Tail = Tail.exact
    is_clip: float | None = 2.0  # upper clip of the importance weight of the drawn token; null: no weight
    aggregation: str = "token-mean"  # how tokens are weighed, see the docs
    success_weighting: SuccessWeighting = SuccessWeighting.none
    entropy_weighting: float = 0.0  # a token weighs exp(-this times the teacher's entropy in nats)
    weight: float = 1.0  # of this loss; what is missing to 1 is that of the policy loss of the section `algorithm`


@dataclass(kw_only=True)
class TeacherConfig(AverageConfig):
    """Of trust_region, `rate` is what the present policy's logits count."""

    mode: TeacherMode = TeacherMode.ema
    every: TeacherUpdate = TeacherUpdate.rollout
    refresh_every: int = 0  # rollout batches after which it becomes a copy of the policy; 0: never


@dataclass(kw_only=True)
class RepromptConfig:
    """What the teacher is shown; newlines of templates count."""

    success_threshold: float = 1.0  # an answer is a success from this reward on
    choice: Choice = Choice.first
    exclude_self: bool = True  # no sample is shown its own answer
    remove_thinking: bool = True  # <think>...</think> of solutions
    feedback: Feedback = Feedback.without_solution
    reprompt_template: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution_template: str = "\nCorrect solution:\n\n{successful_previous_attempt}\n\n"
    feedback_template: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}\n\n"
    max_tokens: int | None = None  # of a teacher's prompt; null: 10240, or what a micro-batch has room for
    overlong: Overlong = Overlong.shrink
