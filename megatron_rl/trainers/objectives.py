"""From the config to the objective that the actor is trained on."""

from megatron_rl.config.rules import PolicyConfig
from megatron_rl.config.schema import AlgorithmConfig, CorrectionLevel, EmaAxis, GrpoConfig, KLPlace, Loss
from megatron_rl.workers.objective import PolicyGradient
from megatron_rl.workers.smoothing import Smoother


def updates_per_step(config: PolicyConfig) -> int:
    """Optimizer steps that one rollout batch is used for."""
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


def policy_objective(config: GrpoConfig) -> PolicyGradient:
    """The named algorithm with its options filled in."""
    algorithm, ema, correction = config.algorithm, config.ema, config.rollout_correction
    assert algorithm.loss is not None and ema.gradient is not None
    on_policy = updates_per_step(config) == 1 and not correction.bypass
    smoother = None
    if algorithm.loss is Loss.ppo_clip and (ema.axis is not EmaAxis.none or not on_policy):
        smoother = Smoother(axis=ema.axis.value, beta=ema.beta, init=ema.init.value, gradient=ema.gradient.value)
    return PolicyGradient(
        loss=algorithm.loss.value,
        options=loss_options(algorithm),
        entropy_coeff=algorithm.entropy_coeff,
        smoother=smoother,
        kl_estimator=config.kl.estimator.value if config.kl.where is KLPlace.loss else None,
        kl_gradient=config.kl.gradient.value,
        kl_coeff=config.kl.coeff,
        corrected=correction.level is not CorrectionLevel.none,
        opsm_delta=correction.opsm_delta,
        temperature=config.rollout.temperature,
        on_policy=on_policy,
    )
