"""Which figures are shown together, and where healthy values lie."""

from typing import NamedTuple

from megatron_rl.metrics.rules import RULES
from megatron_rl.report.series import RunData


class Panel(NamedTuple):
    """One picture. `names` may hold a star at their end; `healthy` is a band of good values."""

    title: str
    names: tuple[str, ...]
    healthy: tuple[float, float] | None = None
    log: bool = False


class Section(NamedTuple):
    title: str
    note: str
    panels: tuple[Panel, ...]


_LENGTH = RULES["length_corr"].limit
_HARD = RULES["hard_samples"].limit, 0.15
_ACCURACY = RULES["d_acc_low"].limit, RULES["d_acc_saturated"].limit
_DIFFERENCE = RULES["score_diff_low"].limit, RULES["score_diff_high"].limit

LEARNING = Section(
    "Learning",
    "",
    (
        Panel("Reward", ("critic/score/mean",)),
        Panel("Held-out accuracy", ("val/accuracy", "val/pass@*", "val_average/accuracy")),
        Panel("Loss", ("actor/loss", "actor/pg_loss", "sft/loss", "self_distillation/loss")),
        Panel("Entropy", ("actor/entropy", "rollout/entropy")),
        Panel("Distance to other policies", ("actor/kl_loss", "actor/ppo_kl", "actor/reward_kl_penalty")),
        Panel("Format", ("reward/format", "reward/format_mean")),
        Panel("Correct responses, silent groups", ("rollout/correct", "rollout/silent_groups")),
        Panel("Answers kept, prompts with one", ("expert/kept_fraction", "expert/solved_prompts")),
        Panel("Critic loss", ("critic/d_loss", "critic/ranking_loss", "critic/vf_loss")),
        Panel("Value function", ("critic/vpred_mean", "critic/vf_explained_var", "critic/vf_clipfrac")),
    ),
)
CRITIC = Section(
    "Critic",
    "The shaded bands are where a critic is of use.",
    (
        Panel("Pairs told apart", ("critic/d_acc", "critic/d_acc_soft", "val/d_acc"), _ACCURACY),
        Panel("Teacher's score less student's", ("critic/score_diff", "critic/raw_score_diff"), _DIFFERENCE),
        Panel("Mean scores", ("critic/teacher_value_mean", "critic/student_value_mean")),
        Panel("Spread of scores", ("critic/teacher_value_std", "critic/student_value_std")),
        Panel(
            "Distance of identical texts",
            ("critic/identical_text_gap",),
            (0.0, RULES["identical_text_gap"].limit),
        ),
        Panel("Pairs that could not be scored", ("critic/invalid_pair_ratio",)),
    ),
)
LENGTH = Section(
    "Length bias",
    "Scores that go with length teach the policy to write long, or short.",
    (
        Panel("Correlation of length and score", ("reward/length_corr",), (-_LENGTH, _LENGTH)),
        Panel("Response length", ("response_length/mean", "response_length/max", "response_length/min")),
        Panel("Teacher's and student's length", ("critic/teacher_length", "critic/student_length")),
        Panel("Responses that were cut off", ("response_length/clip_ratio",)),
    ),
)
GRADIENTS = Section(
    "Gradients and updates",
    "",
    (
        Panel("Gradient norm of the policy", ("actor/grad_norm",), log=True),
        Panel("Gradient norm of the critic", ("critic/grad_norm", "critic/grad_norm_clipped"), log=True),
        Panel("Clipped tokens", ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")),
        Panel("Learning rate", ("actor/lr", "critic/lr")),
        Panel("Largest ratio", ("actor/ratio_max",)),
        Panel("Skipped updates", ("actor/skipped",)),
    ),
)
ROLLOUTS = Section(
    "Rollouts against the trainer",
    "",
    (
        Panel("Mean importance weight", ("rollout_corr/rollout_is_mean",)),
        Panel("Distance of the two policies", ("rollout_corr/k3_kl", "rollout_corr/kl")),
        Panel("Gap of log-probabilities", ("rollout/log_prob_gap_max", "rollout/log_prob_gap_mean"), log=True),
        Panel("Gap of probabilities", ("training/rollout_probs_diff_mean",)),
    ),
)
HARD = Section(
    "Hard samples",
    "Pairs whose scores are less than 0.1 apart.",
    (Panel("Share of hard samples", ("critic/hard_sample_ratio",), _HARD),),
)
THROUGHPUT = Section(
    "Throughput",
    "",
    (
        Panel("Tokens per second", ("perf/tokens_per_second", "perf/throughput")),
        Panel(
            "Seconds per step",
            (
                "timing_s/step",
                "timing_s/gen",
                "timing_s/update_actor",
                "timing_s/update_critic",
                "timing_s/old_log_prob",
            ),
        ),
    ),
)
SECTIONS = (LEARNING, CRITIC, LENGTH, GRADIENTS, ROLLOUTS, HARD, THROUGHPUT)


def present(panel: Panel, run: RunData) -> list[str]:
    """Those of a panel's figures that a run has values of."""
    found: list[str] = []
    for name in panel.names:
        matching = sorted(n for n in run.curves if n.startswith(name[:-1])) if name.endswith("*") else [name]
        found += [n for n in matching if n in run.curves and len(run.curves[n].finite().steps)]
    return found
