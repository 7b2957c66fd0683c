"""From the config to the objective that the actor is trained on."""

from dataclasses import replace

from megatron_rl.config.schema import (
    AlgorithmConfig,
    CorrectionLevel,
    EmaAxis,
    EmaConfig,
    EmaGradient,
    GrpoConfig,
    KLPlace,
    Loss,
    PolicyConfig,
    PolicyGradientConfig,
    RolloutTrainerConfig,
)
from megatron_rl.workers.objective import PolicyGradient
from megatron_rl.workers.smoothing import Smoother


def updates_per_step(config: RolloutTrainerConfig) -> int:
    """Optimizer steps that one rollout batch is used for, at most."""
    return config.train.mini_batches_per_step * config.train.epochs_per_step


def loss_options(algorithm: AlgorithmConfig) -> dict[str, float | None]:
    """What the policy loss takes of the config."""
    clip = {"clip_low": algorithm.clip_low, "clip_high": algorithm.clip_high}
    match algorithm.loss:
        case Loss.ppo_clip:
            return clip | {"dual_clip": algorithm.dual_clip or None}
        case Loss.gspo | Loss.geo_mean | Loss.cispo:
            return clip
        case Loss.dppo_tv | Loss.dppo_kl:
            return clip | {"max_ratio": algorithm.max_ratio}
        case Loss.sapo:
            return {
                "temperature_positive": algorithm.temperature_positive,
                "temperature_negative": algorithm.temperature_negative,
            }
        case Loss.dro:
            return {"beta": algorithm.pull}
        case _:
            return {}


def is_on_policy(config: PolicyConfig) -> bool:
    """Whether the policy that an update starts from is the current one: the first update of a batch, and its only."""
    return updates_per_step(config) == 1 and not config.rollout_correction.bypass


def policy_gradient(config: PolicyConfig) -> PolicyGradient:
    """The named algorithm with its options filled in."""
    algorithm, correction = config.algorithm, config.rollout_correction
    assert algorithm.loss is not None
    return PolicyGradient(
        loss=algorithm.loss.value,
        options=loss_options(algorithm),
        entropy_coeff=algorithm.entropy_coeff,
        corrected=correction.level is not CorrectionLevel.none,
        opsm_delta=correction.opsm_delta,
        temperature=config.rollout.temperature,
        on_policy=is_on_policy(config),
    )


def policy_objective(config: PolicyGradientConfig) -> PolicyGradient:
    """The algorithm, and what trainers with a reference have beside it: the distance to it, and smoothed weights."""
    objective = policy_gradient(config)
    return replace(
        objective,
        smoother=_smoother(config, on_policy=objective.on_policy),
        kl_estimator=config.kl.estimator.value if config.kl.where is KLPlace.loss else None,
        kl_gradient=config.kl.gradient.value,
        kl_coeff=config.kl.coeff,
    )


def _smoother(config: PolicyGradientConfig, *, on_policy: bool) -> Smoother | None:
    """Also where nothing is smoothed it records the weights of the clipped loss, unless all of them are one."""
    ema = config.ema if isinstance(config, GrpoConfig) else EmaConfig()
    if config.algorithm.loss is not Loss.ppo_clip or (ema.axis is EmaAxis.none and on_policy):
        return None
    gradient = ema.gradient or EmaGradient.full
    return Smoother(axis=ema.axis.value, beta=ema.beta, init=ema.init.value, gradient=gradient.value)
