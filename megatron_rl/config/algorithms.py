"""What the named policy-gradient algorithms stand for."""

from typing import Any

from megatron_rl.config.schema import Advantage, Algorithm, Loss

# What a named algorithm is where the config leaves an option open: GRPO's values, and what each paper has otherwise.
GRPO: dict[str, Any] = {
    "advantage": Advantage.grpo,
    "loss": Loss.ppo_clip,
    "clip_low": 0.2,
    "clip_high": 0.2,
    "dual_clip": 3.0,
    "normalize_by_std": True,
    "aggregation": "token-mean",
    "max_rollout_batches": 1,
    "overlong_buffer": 0,
    "drop_truncated": False,
}
WITHOUT_STD = GRPO | {"normalize_by_std": False, "aggregation": "seq-mean-token-sum-norm"}
BY_SEQUENCE = GRPO | {"dual_clip": 0.0, "aggregation": "seq-mean-token-mean"}
ALGORITHM_DEFAULTS: dict[Algorithm, dict[str, Any]] = {
    # Shao et al., 2024; token mean and dual clip as in verl.
    Algorithm.grpo: GRPO,
    # Liu et al., 2025.
    Algorithm.dr_grpo: WITHOUT_STD,
    # Yu et al., 2025: clip higher, refill silent groups, and a soft limit on length (a fifth of it, as in the paper).
    Algorithm.dapo: GRPO | {"clip_high": 0.28, "max_rollout_batches": 10, "overlong_buffer": None},
    # Zheng et al., 2025.
    Algorithm.gspo: BY_SEQUENCE | {"loss": Loss.gspo, "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax-M1, 2025, with the cap of ScaleRL.
    Algorithm.cispo: GRPO | {"loss": Loss.cispo, "clip_low": 1.0, "clip_high": 4.0},
    # Gao et al., 2025.
    Algorithm.sapo: BY_SEQUENCE | {"loss": Loss.sapo},
    # Zhao et al., 2025.
    Algorithm.gmpo: BY_SEQUENCE | {"loss": Loss.geo_mean, "clip_low": 0.4, "clip_high": 0.4},
    # Qi et al., 2026.
    Algorithm.dppo_tv: WITHOUT_STD | {"loss": Loss.dppo_tv, "clip_low": 0.15, "clip_high": 0.15},
    Algorithm.dppo_kl: WITHOUT_STD | {"loss": Loss.dppo_kl, "clip_low": 0.05, "clip_high": 0.05},
    # Richemond et al., 2024.
    Algorithm.dro: GRPO | {"loss": Loss.dro},
    # Schulman et al., 2017, with a critic for the baseline: the trainer ppo.
    Algorithm.ppo: GRPO | {"advantage": Advantage.gae, "dual_clip": 0.0},
    # Chu et al., 2025.
    Algorithm.gpg: GRPO | {"advantage": Advantage.gpg, "loss": Loss.reinforce},
    # Other comparisons under GRPO's clipped loss: Ahmadian et al., 2024; Hao et al., 2025; Li et al., 2023; Tang et
    # al., 2025; Hu et al., 2025.
    **{
        Algorithm(name): GRPO | {"advantage": Advantage(name)}
        for name in ("rloo", "opo", "remax", "pass_at_k", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    },
}
