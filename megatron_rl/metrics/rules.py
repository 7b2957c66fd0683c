"""What a run is watched for: one table of rules over the logged figures.

Every rule says what it reads, when that is wrong, the likely cause and what to try.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from megatron_rl.metrics.critic_rules import CRITIC_RULES
from megatron_rl.metrics.policy_rules import POLICY_RULES
from megatron_rl.metrics.rule import SOLVED, Action, Kind, Rule

TABLE = (
    Rule(
        name="parity",
        figures=("rollout/log_prob_gap_max",),
        kind=Kind.above,
        limit=1e-3,
        action=Action.stop,
        option="rollout.parity_tolerance",
        cause="a large gap on every token means that the engine did not get the trainer's weights, another "
        "temperature, or another rotary embedding; a small one means lower precision",
        remedy="compare the engine's config with the trainer's, or raise the tolerance for bfloat16",
    ),
    Rule(
        name="weight_checksum",
        figures=("sync/wrong_tensors",),
        kind=Kind.above,
        limit=0,
        action=Action.stop,
        cause="the engine dropped, permuted or rounded what it was sent",
        remedy="give the engine the trainer's precision and compare its loading of the tensors named",
    ),
    Rule(
        name="finish_mismatch",
        figures=("audit/finish_mismatch",),
        kind=Kind.above,
        limit=0,
        cause="the engine ends responses by other tokens than the tokenizer and generation_config.json name",
        remedy="make eos_token_id in generation_config.json the list of tokens that end a response",
    ),
    Rule(
        name="pad_is_eos",
        figures=("audit/pad_is_eos",),
        kind=Kind.above,
        limit=0,
        cause="the tokenizer pads with a token that ends responses; harmless here, where nothing is padded in "
        "training, but a tool that masks by the padding id would never teach the model to stop",
        remedy="name a pad_token of its own in tokenizer_config.json",
    ),
    Rule(
        name="prompt_loss",
        figures=("audit/prompt_loss",),
        kind=Kind.above,
        limit=0,
        action=Action.stop,
        cause="the loss mask reaches into the prompt: the model is trained to write its own questions",
        remedy="look at prompt_length and loss_mask where samples are made",
    ),
    Rule(
        name="token_mismatch",
        figures=("audit/token_mismatch",),
        kind=Kind.above,
        limit=0,
        action=Action.stop,
        cause="what is trained on is not what was drawn: text that was tokenised again, cut or reordered",
        remedy="make samples from the rollout's token_ids as they are",
    ),
    Rule(
        name="truncated",
        figures=("response_length/clip_ratio",),
        kind=Kind.above,
        limit=0.9,
        patience=3,
        cause="responses do not end: the limit is too short for the task, or the model has forgotten to stop",
        remedy="raise rollout.max_new_tokens, check the tokens that end a response, or set algorithm.overlong_buffer",
    ),
    Rule(
        name="skipped_update",
        figures=("actor/skipped", "critic/skipped"),
        kind=Kind.above,
        limit=0,
        keep_samples=True,
        cause="a loss or a gradient was not finite, and the update was left out",
        remedy="if it comes again, lower optim.lr or optim.clip_grad and look at the rewards and ratios of the step",
    ),
    Rule(
        name="skipped_in_a_row",
        figures=("actor/skipped", "critic/skipped"),
        kind=Kind.above,
        limit=0,
        patience=3,
        action=Action.stop,
        option="guards.max_skipped_steps",
        cause="losses or gradients are no longer finite; no such update has touched the weights",
        remedy="continue from an earlier checkpoint with a lower optim.lr, or in float32",
    ),
    Rule(
        name="grad_spike",
        figures=("actor/grad_norm",),
        kind=Kind.above_median,
        limit=10,
        window=20,
        floor=1.0,
        keep_samples=True,
        cause="a few samples with extreme ratios or rewards, or a learning rate on the edge",
        remedy="look at the step's samples, lower optim.clip_grad or optim.lr",
    ),
    Rule(
        name="silent_groups",
        figures=("rollout/silent_groups",),
        kind=Kind.above,
        limit=0.95,
        patience=3,
        unless=SOLVED,
        cause="nearly all advantages are zero: the problems are too hard for this model or too easy, or the reward "
        "cannot tell",
        remedy="change the data's difficulty, fine-tune the model on examples first, raise rollout.group_size, or set "
        "algorithm.max_rollout_batches",
    ),
    Rule(
        name="negative_kl",
        figures=("actor/kl_loss", "actor/reward_kl_penalty"),
        kind=Kind.below,
        limit=-1e-4,
        cause="the distance to the reference cannot be negative: policy and reference were not measured on the same "
        "tokens, at one temperature, or the estimator is wrong",
        remedy="check that both score the same samples; k1 alone may dip below zero, by noise",
    ),
    Rule(
        name="negative_ppo_kl",
        figures=("actor/ppo_kl",),
        kind=Kind.below,
        limit=-0.1,
        cause="the drawn tokens have become far likelier than they were: the update learns its samples by heart, or "
        "old log-probabilities are another policy's",
        remedy="lower optim.lr or train.epochs_per_step, or compare old log-probabilities with the engine's",
    ),
    Rule(
        name="entropy_explosion",
        figures=("actor/entropy", "rollout/entropy"),
        kind=Kind.above_start,
        limit=3,
        window=5,
        floor=1.0,
        patience=2,
        cause="the policy is dissolving into noise: learning rate or entropy bonus too high, or rewards that punish "
        "whatever is likely",
        remedy="lower optim.lr or algorithm.entropy_coeff, or set kl.where=loss",
    ),
    Rule(
        name="entropy_high",
        figures=("actor/entropy", "rollout/entropy"),
        kind=Kind.above,
        limit=6,
        patience=2,
        cause="tokens are drawn almost at random: the weights are not a trained model's, or training destroyed them",
        remedy="check model.path and model.weights; otherwise go back to a checkpoint and lower optim.lr",
    ),
    Rule(
        name="entropy_collapse",
        figures=("actor/entropy", "rollout/entropy"),
        kind=Kind.below_start,
        limit=0.1,
        window=5,
        patience=3,
        unless=SOLVED,
        cause="the policy has settled before the task is solved, and explores no more",
        remedy="raise algorithm.clip_high or algorithm.entropy_coeff, set kl.where=loss, or lower optim.lr; in "
        "self-distillation lower teacher.rate, or set distill.success_weighting",
    ),
    Rule(
        name="entropy_low",
        figures=("actor/entropy", "rollout/entropy"),
        kind=Kind.below,
        limit=5e-3,
        patience=3,
        unless=SOLVED,
        cause="the policy draws one answer only: groups hold copies, and advantages vanish",
        remedy="raise rollout.temperature, or go back to a checkpoint with more entropy",
    ),
    Rule(
        name="reward_fall",
        figures=("critic/score/mean",),
        kind=Kind.fall,
        limit=0.5,
        window=10,
        scale="critic/score/std",
        cause="what was learned is being lost: the policy ran away, or rewards or data changed",
        remedy="go back to the checkpoint before the fall, lower optim.lr, or set kl.where=loss; in self-distillation "
        "lower teacher.rate or distill.weight",
    ),
    Rule(
        name="constant_reward",
        figures=("critic/score/std",),
        kind=Kind.below,
        limit=1e-9,
        patience=3,
        unless=SOLVED,
        cause="every response is worth the same, so nothing is learned: the reward reads the wrong field or format, or "
        "the model is too weak to be right even once",
        remedy="judge a few responses by hand; check reward.name, reward.options and the data's answers; begin with a "
        "model that is right now and then",
    ),
    Rule(
        name="same_response",
        figures=("rollout/commonest_response",),
        kind=Kind.above,
        limit=0.9,
        patience=3,
        cause="different prompts get the same text: the prompt does not reach the model, or the reward pays for one "
        "phrase",
        remedy="read val/answers; check data.prompt_key, the chat template and the reward",
    ),
    Rule(
        name="length_runaway",
        figures=("response_length/mean",),
        kind=Kind.above_median,
        limit=2,
        window=20,
        floor=16,
        patience=3,
        cause="responses grow without bound: the reward or the loss's token weights favour length, or the model has "
        "forgotten to stop",
        remedy="set algorithm.overlong_buffer, try algorithm.aggregation=token-mean, or look for repetition",
    ),
    Rule(
        name="no_targets",
        figures=("self_distillation/target_fraction",),
        kind=Kind.below,
        limit=0.05,
        patience=3,
        unless=SOLVED,
        cause="hardly a response has anything to learn from a teacher: no sibling succeeds, and the reward says "
        "nothing",
        remedy="take easier problems, raise rollout.group_size, let the reward give feedback (reprompt.feedback), or "
        "look at reprompt.success_threshold",
    ),
    Rule(
        name="teacher_is_student",
        figures=("self_distillation/sampled_token_distance",),
        kind=Kind.below,
        limit=1e-3,
        patience=3,
        unless=SOLVED,
        cause="the teacher says what the student says: it reads the same prompt, or makes nothing of its context",
        remedy="look at the teacher's prompt and at reprompt.reprompt_template; a model that does not use what it is "
        "shown must first learn to",
    ),
    Rule(
        name="teacher_is_lost",
        figures=("self_distillation/sampled_token_gap",),
        kind=Kind.below,
        limit=-3,
        patience=3,
        cause="the teacher would hardly ever have written what the student did: its prompt is garbled, or its weights "
        "are of another model or too old",
        remedy="look at the teacher's prompt, check reprompt.max_tokens, or set teacher.refresh_every or a higher "
        "teacher.rate",
    ),
    Rule(
        name="topk_mass_low",
        figures=("self_distillation/student_topk_mass",),
        kind=Kind.below,
        limit=0.8,
        patience=3,
        cause="much of the student's probability is outside the list, where the teacher's distribution is one number, "
        "or with distill.tail=none nothing",
        remedy="raise distill.topk, or set distill.support=full",
    ),
    Rule(
        name="topk_mass_fall",
        figures=("self_distillation/student_topk_mass",),
        kind=Kind.below_start,
        limit=0.95,
        window=5,
        patience=3,
        cause="probability leaves the list for ids that the loss does not tell apart: the student is dissolving where "
        "it is not looked at",
        remedy="set distill.tail=exact, raise distill.topk, or lower optim.lr",
    ),
    *POLICY_RULES,
    *CRITIC_RULES,
)
RULES = {rule.name: rule for rule in TABLE}


def chosen_rules(
    *,
    ignore: Collection[str],
    stop: Collection[str],
    limits: Mapping[str, float],
    parity_tolerance: float,
    max_skipped_steps: int,
    signed_kl: bool,
    moving_rewards: bool,
    own_answers: bool,
) -> list[Rule]:
    """The table as a run's options have it; ValueError on a name or a limit that it has no place for.

    `signed_kl`: the distance to the reference is estimated by k1, which noise may bring below zero. `moving_rewards`:
    they are the scores of a critic that learns, and a fall of theirs says nothing of the policy. `own_answers`: the
    model learns from what it draws, and must keep drawing different things; one that is shown what to say need not.
    """
    for option, names in (("guards.ignore", ignore), ("guards.stop", stop), ("guards.limits", limits)):
        for name in names:
            if name not in RULES:
                near = difflib.get_close_matches(name, RULES, 1, cutoff=0)[0]
                raise ValueError(f"{option} names {name!r}, which is no rule; did you mean {near!r}?")
    for name in limits:
        if RULES[name].option:
            raise ValueError(f"guards.limits.{name}={limits[name]:g}: this one is set by {RULES[name].option}")
    own: dict[str, dict[str, Any]] = {rule.name: {} for rule in TABLE}
    own["parity"]["limit"] = parity_tolerance
    own["skipped_in_a_row"]["patience"] = max_skipped_steps
    if signed_kl:
        own["negative_kl"]["limit"] = -0.05
    for name, limit in limits.items():
        own[name]["limit"] = limit
    for name in stop:
        own[name]["action"] = Action.stop
    unwatched = {*ignore, *(("reward_fall", "zero_reward") if moving_rewards else ())}
    unwatched |= set() if own_answers else {"entropy_collapse", "entropy_low"}
    return [replace(rule, **own[rule.name]) for rule in TABLE if rule.name not in unwatched]
