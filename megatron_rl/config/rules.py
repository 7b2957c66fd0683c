"""Values and combinations that cannot be run."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from megatron_rl.config.algorithms import GRPO
from megatron_rl.config.expert import Keep
from megatron_rl.config.optim import OptimConfig
from megatron_rl.config.schema import (
    Advantage,
    AlgorithmConfig,
    AverageConfig,
    CorrectionLevel,
    EmaAxis,
    EngineName,
    EvaluationConfig,
    ExpertIterationConfig,
    GadConfig,
    GrpoConfig,
    KLEstimator,
    KLGradient,
    KLPlace,
    LikelihoodConfig,
    Loss,
    MeasureConfig,
    ParallelConfig,
    PolicyConfig,
    PolicyGradientConfig,
    PpoConfig,
    RolloutConfig,
    RolloutTrainerConfig,
    SamplingConfig,
    SdpoConfig,
    TrainerConfig,
)
from megatron_rl.config.sdpo import DistillLoss, TeacherMode

Config = TrainerConfig

# More than this is a slip of the hand, and would keep the check itself busy for hours.
MOST_RANKS, MOST_SEQUENCES = 2**16, 2**20
WITHOUT_GROUPS = (Advantage.remax, Advantage.reinforce_plus_plus, Advantage.gae)
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
BY_CONSTANT = "seq-mean-token-sum-norm"
LOWER_IS_BETTER = ("val/truncated", "val/reward_failed", "val/format_wrong", "val/format_only")
OF_LIKELIHOOD = ("token-mean", "seq-mean-token-mean", BY_CONSTANT)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POSITIVE = (
    "rollout.vllm.tp",
    "rollout.vllm.kv_cache_gb",
    "rollout.vllm.server.count",
    "rollout.vllm.server.start_timeout_s",
    "rollout.vllm.server.timeout_s",
    "parallel.tp",
    "parallel.pp",
    "parallel.vpp",
    "parallel.dp",
    "parallel.ep",
    "parallel.etp",
    "train.steps",
    "train.batch_size",
    "train.max_tokens_per_micro_batch",
    "data.max_prompt_tokens",
    "rollout.max_new_tokens",
    "rollout.max_sequences",
    "rollout.group_size",
    "rollout.parity_tolerance",
    "reward.workers",
    "reward.deadline_s",
    "reward.memory_gb",
    "eval.limit",
    "eval.max_new_tokens",
    "eval.chunk",
    "checkpoint.keep",
    "guards.max_skipped_steps",
    "run.stop_after",
)
NOT_NEGATIVE = (
    "train.seed",
    "eval.every",
    "eval.samples",
    "eval.seed",
    "eval.shots",
    "checkpoint.every",
    "checkpoint.keep_every",
    "rollout.parity_every",
    "log.histograms_every",
    "run.hang_timeout_s",
)


class ConfigError(ValueError):
    """The user's configuration cannot be run; the message names the field, the value and what to change."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every option that is a number, by its dotted key."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{prefix}{item.name}.")
        elif isinstance(value, int | float):
            yield prefix + item.name, value


def _check_size(config: Config | EvaluationConfig) -> None:
    """Numbers that can be computed with, and a step or a chunk that can be planned."""
    for key, value in _numbers(config):
        _require(math.isfinite(value), f"{key}={value} must be a finite number")
        _require(abs(value) < 2**63 or isinstance(value, float), f"{key}={value} does not fit 64 bits")
    parallel = config.parallel
    group_size = config.rollout.group_size if isinstance(config, RolloutTrainerConfig) else 1
    _require(
        parallel.tp * parallel.pp * (parallel.dp or 1) <= MOST_RANKS,
        f"parallel.tp={parallel.tp} times pp={parallel.pp} times dp={parallel.dp or 1} is more than {MOST_RANKS} ranks",
    )
    if isinstance(config, EvaluationConfig):
        _require(
            config.eval.chunk * max(config.eval.samples, 1) <= MOST_SEQUENCES,
            f"eval.chunk={config.eval.chunk} problems with eval.samples={config.eval.samples} draws are more than "
            f"{MOST_SEQUENCES} sequences at once",
        )
        return
    _require(
        config.train.batch_size * group_size <= MOST_SEQUENCES,
        f"train.batch_size={config.train.batch_size} with {group_size} responses to a prompt is more than "
        f"{MOST_SEQUENCES} sequences in a step",
    )


def _check_signs(config: Config | EvaluationConfig) -> None:
    """Each schema has some of these options; what is null is not looked at."""
    values = dict(_numbers(config))
    for key in POSITIVE:
        _require(values.get(key, 1) > 0, f"{key}={values.get(key)} must be greater than 0")
    for key in NOT_NEGATIVE:
        _require(values.get(key, 0) >= 0, f"{key}={values.get(key)} must not be negative")


def _check_rollout(rollout: SamplingConfig) -> None:
    _require(rollout.temperature > 0, f"rollout.temperature={rollout.temperature} must be greater than 0")
    _require(0 < rollout.top_p <= 1, f"rollout.top_p={rollout.top_p} must be in (0, 1]")
    _require(rollout.top_k >= 0, f"rollout.top_k={rollout.top_k} must not be negative; 0 means no limit")
    _require(all(rollout.stop), f"rollout.stop={rollout.stop} holds an empty text, which every response has: remove it")
    _check_server(rollout)


def _check_server(rollout: SamplingConfig) -> None:
    server = rollout.vllm.server
    far = [url for url in server.urls if urlsplit(url).hostname not in LOOPBACK]
    for url in server.urls:
        parts = urlsplit(url)
        _require(
            parts.scheme == "http" and parts.hostname is not None,
            f"rollout.vllm.server.urls holds {url!r}, which is no address as http://host:8000",
        )
    _require(
        not far or server.exchange is not None or server.broadcast,
        f"rollout.vllm.server.urls holds {', '.join(far)}, which may be another host: name in "
        "rollout.vllm.server.exchange a folder that it shares with this one, for the weights, or set "
        "rollout.vllm.server.broadcast=true",
    )
    _require(
        not server.gpus or len(server.gpus) == server.count * rollout.vllm.tp,
        f"rollout.vllm.server.gpus={server.gpus} are {len(server.gpus)}; rollout.vllm.server.count={server.count} "
        f"servers of rollout.vllm.tp={rollout.vllm.tp} need {server.count * rollout.vllm.tp}",
    )
    _require(server.restarts >= 0, f"rollout.vllm.server.restarts={server.restarts} must not be negative")


def _check_groups(rollout: RolloutConfig) -> None:
    _require(
        rollout.engine is not EngineName.vllm_server or rollout.group_size <= rollout.max_sequences,
        f"rollout.group_size={rollout.group_size} responses are asked of a server together, and "
        f"rollout.max_sequences={rollout.max_sequences} are the most: raise it",
    )


def _check_ahead(config: RolloutTrainerConfig) -> None:
    if not config.rollout.vllm.server.ahead:
        return
    _require(
        config.rollout.engine is EngineName.vllm_server,
        f"rollout.vllm.server.ahead=true draws beside the trainer, and rollout.engine={config.rollout.engine.value} in "
        "it: set rollout.engine=vllm_server",
    )
    corrected = isinstance(config, PolicyConfig) and (
        config.rollout_correction.level is not CorrectionLevel.none or config.rollout_correction.bypass
    )
    _require(
        corrected,
        "rollout.vllm.server.ahead=true learns from rollouts of the policy before the last update, which importance "
        "weights must correct: set rollout_correction.level=token"
        if isinstance(config, PolicyConfig)
        else f"rollout.vllm.server.ahead=true needs rollout correction, which trainer={config.trainer} does not have",
    )


def _check_truncation(rollout: SamplingConfig) -> None:
    _require(
        rollout.engine in (EngineName.auto, EngineName.hf) or (rollout.top_p == 1 and rollout.top_k == 0),
        f"rollout.top_p={rollout.top_p} with rollout.top_k={rollout.top_k}: vLLM does not say how much of a "
        "distribution is kept, which importance weights need. Set them to 1 and 0, or rollout.engine=hf",
    )


def _check_parallel(parallel: ParallelConfig) -> None:
    _require(
        parallel.vpp == 1 or parallel.pp > 1,
        f"parallel.vpp={parallel.vpp} needs parallel.pp > 1: it cuts stages in chunks",
    )
    _require(
        not parallel.sequence_parallel or parallel.tp > 1,
        "parallel.sequence_parallel=true needs parallel.tp > 1: with one tensor rank nothing is cut",
    )
    stage = parallel.tp * (parallel.dp or parallel.ep * parallel.etp)
    _require(
        stage % (parallel.ep * parallel.etp) == 0,
        f"parallel.ep={parallel.ep} times parallel.etp={parallel.etp} must divide the parallel.tp={parallel.tp} times "
        f"parallel.dp={parallel.dp} ranks of a stage, which the experts are cut over",
    )


def _check_shots(measure: MeasureConfig) -> None:
    _require(
        (measure.shots > 0) == (measure.shots_from is not None),
        f"eval.shots={measure.shots} and eval.shots_from={measure.shots_from!r} go together: the number of solved "
        "examples, and the file whose first rows they are",
    )


def _check_best(config: Config) -> None:
    best = config.checkpoint.best
    if best is None:
        return
    _require(
        best.startswith("val/") and best not in LOWER_IS_BETTER,
        f"checkpoint.best={best!r} must be a figure of evaluations for which more is better, as val/accuracy",
    )
    _require(
        config.data.val is not None,
        f"checkpoint.best={best!r} is a figure of held-out problems, and there are none: set data.val",
    )


def _check_average(key: str, average: AverageConfig) -> None:
    _require(0 < average.rate <= 1, f"{key}.rate={average.rate} must be in (0, 1]; it weighs the new weights")
    for name in ("inv_gamma", "power"):
        _require(getattr(average, name) > 0, f"{key}.{name}={getattr(average, name)} must be greater than 0")
    _require(
        0 <= average.min <= average.max <= 1,
        f"{key}.min={average.min} and {key}.max={average.max} bound a decay: 0 <= min <= max <= 1",
    )
    _require(average.update_after >= 0, f"{key}.update_after={average.update_after} must not be negative")


def check(config: Config | EvaluationConfig) -> None:
    """Values and combinations that cannot be run; raises ConfigError on the first."""
    _check_size(config)
    _check_signs(config)
    _check_rollout(config.rollout)
    _check_parallel(config.parallel)
    if isinstance(config, EvaluationConfig):
        _check_shots(config.eval)
        return
    _check_optim("optim", config.optim)
    _check_best(config)
    _check_profile(config)
    if isinstance(config, SdpoConfig):
        _check_average("teacher", config.teacher)
    elif isinstance(config, LikelihoodConfig | GrpoConfig):
        _check_average("average", config.average)
    if isinstance(config, RolloutTrainerConfig):
        _check_updates(config)
        _check_truncation(config.rollout)
        _check_ahead(config)
        _check_groups(config.rollout)
    if isinstance(config, LikelihoodConfig):
        _check_likelihood(config)
    if isinstance(config, ExpertIterationConfig):
        _check_expert(config)
    if isinstance(config, PolicyConfig):
        _check_policy(config)
    if isinstance(config, PolicyGradientConfig):
        _check_algorithm(config)
        _check_kl(config)
    if isinstance(config, GrpoConfig):
        _check_ema(config)
    if isinstance(config, PpoConfig):
        _check_ppo(config)
    if isinstance(config, GadConfig):
        _check_gad(config)
    if isinstance(config, SdpoConfig):
        _check_sdpo(config)


def _check_profile(config: Config) -> None:
    steps, last = config.train.profile, config.train.steps
    beyond = [step for step in steps if not 1 <= step <= last]
    _require(not beyond, f"train.profile={steps} names steps from 1 to train.steps={last}; there is no {beyond}")


def _check_updates(config: RolloutTrainerConfig) -> None:
    """What every trainer that learns from its own answers asks."""
    for key in ("mini_batches_per_step", "epochs_per_step"):
        _require(getattr(config.train, key) > 0, f"train.{key}={getattr(config.train, key)} must be greater than 0")


def _check_likelihood(config: LikelihoodConfig) -> None:
    """What every trainer that learns given tokens asks."""
    aggregation, normalizer = config.train.aggregation, config.train.normalizer
    _require(
        aggregation in OF_LIKELIHOOD, f"train.aggregation={aggregation!r} is not one of {', '.join(OF_LIKELIHOOD)}"
    )
    _require(
        normalizer is None or aggregation == BY_CONSTANT,
        f"train.normalizer={normalizer} divides the sums of {BY_CONSTANT} and does not go with train.aggregation="
        f"{aggregation}: remove it, or set train.aggregation={BY_CONSTANT}",
    )
    _require(
        aggregation != BY_CONSTANT or (normalizer is not None and normalizer > 0),
        f"train.normalizer={normalizer} must be a number greater than 0 with train.aggregation={BY_CONSTANT}: it "
        "divides the sum over each sequence; 1 leaves it a sum",
    )


def _check_expert(config: ExpertIterationConfig) -> None:
    expert, longest = config.expert, config.rollout.max_new_tokens
    _require(
        expert.top_k is None or expert.keep is Keep.top,
        f"expert.top_k={expert.top_k} is of expert.keep=top, and expert.keep={expert.keep.value} keeps all correct "
        "answers: remove it, or set expert.keep=top",
    )
    _require(
        expert.keep is not Keep.top or (expert.top_k is not None and 0 < expert.top_k <= config.rollout.group_size),
        f"expert.top_k={expert.top_k} must be from 1 to rollout.group_size={config.rollout.group_size} with "
        "expert.keep=top",
    )
    _require(
        0 < expert.min_tokens <= longest,
        f"expert.min_tokens={expert.min_tokens} must be from 1 to rollout.max_new_tokens={longest}",
    )


def _check_policy(config: PolicyConfig) -> None:
    """What every trainer that compares answers and policies asks."""
    mini_batches, correction = config.train.mini_batches_per_step, config.rollout_correction
    _require(
        config.train.batch_size % mini_batches == 0,
        f"train.mini_batches_per_step={mini_batches} does not divide train.batch_size={config.train.batch_size}",
    )
    _require(
        config.rollout.top_p == 1.0 and config.rollout.top_k == 0,
        "rollout.top_p < 1 or rollout.top_k > 0 would train on samples of another distribution than the loss assumes; "
        "use them for evaluation and supervised runs only",
    )
    _require(correction.high > 0, f"rollout_correction.high={correction.high} must be greater than 0")
    _require(
        correction.low is None or 0 < correction.low <= correction.high,
        f"rollout_correction.low={correction.low} must be above 0 and at most high={correction.high}",
    )
    _require(
        not (correction.bypass and (correction.level is not CorrectionLevel.none or correction.reject)),
        "rollout_correction.bypass=true takes the engine's policy for the old one, so there is nothing between them to "
        "correct: remove rollout_correction.level and rollout_correction.reject, or bypass",
    )


def _check_sdpo(config: SdpoConfig) -> None:
    distill, reprompt = config.distill, config.reprompt
    most = config.train.max_tokens_per_micro_batch
    _require(
        distill.aggregation in AGGREGATIONS,
        f"distill.aggregation={distill.aggregation!r} is not one of {', '.join(AGGREGATIONS)}",
    )
    _require(0 <= distill.alpha <= 1, f"distill.alpha={distill.alpha} must be between 0 and 1")
    _require(distill.topk > 0, f"distill.topk={distill.topk} must be greater than 0; support=full takes all ids")
    _require(
        distill.is_clip is None or distill.is_clip > 0,
        f"distill.is_clip={distill.is_clip} must be greater than 0, or null for no weight",
    )
    _require(
        distill.loss is not DistillLoss.sampled_token or distill.alpha == 1,
        f"distill.loss=sampled_token estimates the reverse KL and needs distill.alpha=1, not {distill.alpha}",
    )
    _require(
        distill.entropy_weighting >= 0,
        f"distill.entropy_weighting={distill.entropy_weighting} must not be negative; 0 weighs all tokens alike",
    )
    _require(0 <= distill.weight <= 1, f"distill.weight={distill.weight} must be between 0 and 1")
    _check_refresh(config)
    if distill.weight < 1:
        _check_algorithm(config)
    else:
        _check_no_policy_loss(config)
    assert reprompt.max_tokens is not None
    _require(
        reprompt.max_tokens > 0,
        f"reprompt.max_tokens={reprompt.max_tokens} must be greater than 0; by itself it is what "
        f"train.max_tokens_per_micro_batch={most} leaves beside rollout.max_new_tokens",
    )
    _require(
        reprompt.max_tokens + config.rollout.max_new_tokens <= most,
        f"reprompt.max_tokens={reprompt.max_tokens} and rollout.max_new_tokens={config.rollout.max_new_tokens} are "
        f"together more than train.max_tokens_per_micro_batch={most}, and no sequence is split: change one of them",
    )


def _check_refresh(config: SdpoConfig) -> None:
    teacher = config.teacher
    _require(
        teacher.refresh_every >= 0, f"teacher.refresh_every={teacher.refresh_every} must not be negative; 0 means never"
    )
    _require(
        not teacher.refresh_every or teacher.mode in (TeacherMode.ema, TeacherMode.frozen),
        f"teacher.refresh_every={teacher.refresh_every} copies the policy to the teacher, and teacher.mode="
        f"{teacher.mode.value} has no weights to copy to: use teacher.mode=ema or frozen, or teacher.refresh_every=0",
    )


def _check_no_policy_loss(config: SdpoConfig) -> None:
    """With the distillation loss alone, what belongs to the policy loss is refused rather than ignored."""
    plain = AlgorithmConfig(**GRPO)
    for item in dataclasses.fields(plain):
        value = getattr(config.algorithm, item.name)
        _require(
            value == getattr(plain, item.name),
            f"algorithm.{item.name}={value} is of the policy loss, and distill.weight=1 leaves it out: remove it, or "
            "set distill.weight below 1",
        )
    _require(
        config.rollout_correction.opsm_delta is None,
        f"rollout_correction.opsm_delta={config.rollout_correction.opsm_delta} asks for advantages, and distill.weight="
        "1 leaves the policy loss out: remove it, or set distill.weight below 1",
    )


def _check_algorithm(config: PolicyConfig) -> None:
    """What the policy loss asks."""
    algorithm = config.algorithm
    _require(
        algorithm.aggregation in AGGREGATIONS,
        f"algorithm.aggregation={algorithm.aggregation!r} is not one of {', '.join(AGGREGATIONS)}",
    )
    assert algorithm.advantage is not None
    _require(
        isinstance(config, PpoConfig) or algorithm.advantage is not Advantage.gae,
        f"algorithm.advantage=gae (algorithm.name={algorithm.name.value}) needs a critic, which trainer: "
        f"{config.trainer} has not: set trainer: ppo, or another algorithm",
    )
    _require(
        not isinstance(config, PpoConfig) or algorithm.advantage is Advantage.gae,
        f"algorithm.advantage={algorithm.advantage.value} (algorithm.name={algorithm.name.value}) has no use for a "
        "critic: set algorithm.name=ppo or algorithm.advantage=gae, or trainer: grpo",
    )
    _require(
        config.rollout.group_size > 1 or algorithm.advantage in WITHOUT_GROUPS,
        f"rollout.group_size={config.rollout.group_size} must be at least 2: advantages compare answers to one prompt",
    )
    _check_rollout_batches(config)
    _require(
        0 < algorithm.discount <= 1, f"algorithm.discount={algorithm.discount} must be in (0, 1]; 1 discounts nothing"
    )
    for key in ("temperature_positive", "temperature_negative", "max_ratio", "pull"):
        _require(getattr(algorithm, key) > 0, f"algorithm.{key}={getattr(algorithm, key)} must be greater than 0")
    for key in ("clip_low", "clip_high", "overlong_factor"):
        _require(getattr(algorithm, key) >= 0, f"algorithm.{key}={getattr(algorithm, key)} must not be negative")
    _require(
        not algorithm.dual_clip or algorithm.dual_clip > 1,
        f"algorithm.dual_clip={algorithm.dual_clip} must be above 1, or 0 for none",
    )


def _check_kl(config: PolicyGradientConfig) -> None:
    kl = config.kl
    _require(kl.coeff >= 0, f"kl.coeff={kl.coeff} must not be negative")
    _require(
        not (kl.where is KLPlace.loss and kl.estimator is KLEstimator.k1 and kl.gradient is KLGradient.naive),
        "kl.estimator=k1 with kl.gradient=naive cannot be a loss: its gradient does not depend on the reference; use "
        "k2 or k3, another gradient, or kl.where=reward",
    )


def _check_ema(config: GrpoConfig) -> None:
    ema, loss = config.ema, config.algorithm.loss
    _require(0 < ema.beta <= 1, f"ema.beta={ema.beta} must be in (0, 1]; it weighs the new value, so 1 smooths nothing")
    _require(
        ema.axis is EmaAxis.none or loss is Loss.ppo_clip,
        f"ema.axis={ema.axis.value} smooths the ratios of ppo_clip and does not go with algorithm.loss="
        f"{loss.value if loss else None}: use ema.axis=none or algorithm.loss=ppo_clip",
    )


def _check_ppo(config: PpoConfig) -> None:
    ppo = config.ppo
    _require(0 < ppo.gamma <= 1, f"ppo.gamma={ppo.gamma} must be in (0, 1]; 1 discounts nothing")
    _require(0 <= ppo.lam <= 1, f"ppo.lam={ppo.lam} must be between 0 and 1")
    _require(
        ppo.value_clip is None or ppo.value_clip > 0,
        f"ppo.value_clip={ppo.value_clip} must be greater than 0, or null for no bound",
    )
    _require(ppo.critic_warmup >= 0, f"ppo.critic_warmup={ppo.critic_warmup} must not be negative")
    _check_optim("critic.optim", config.critic.optim)


def _check_gad(config: GadConfig) -> None:
    d, algorithm = config.discriminator, config.algorithm
    for key in ("raw_weight", "norm_weight", "l2", "range_penalty", "reward_weight", "sft_steps", "warmup_steps"):
        _require(getattr(d, key) >= 0, f"discriminator.{key}={getattr(d, key)} must not be negative")
    _require(
        d.raw_weight + d.norm_weight > 0,
        f"discriminator.raw_weight={d.raw_weight} and norm_weight={d.norm_weight} leave nothing of a score",
    )
    _require(d.temperature > 0, f"discriminator.temperature={d.temperature} must be greater than 0")
    adaptive = d.adaptive_temperature
    _require(
        adaptive is None or (len(adaptive) == 4 and adaptive[1] >= 0 and 0 < adaptive[2] <= adaptive[3]),
        f"discriminator.adaptive_temperature={adaptive} must be [offset, slope, low, high] with 0 < low <= high",
    )
    _require(
        0 <= d.label_smoothing < 0.5,
        f"discriminator.label_smoothing={d.label_smoothing} must be at least 0 and below 0.5",
    )
    _require(
        d.range_low < d.range_high,
        f"discriminator.range_low={d.range_low} must be below range_high={d.range_high}",
    )
    _require(
        algorithm.max_rollout_batches == 1 and algorithm.advantage is not Advantage.remax,
        f"algorithm.name={algorithm.name.value} asks for more answers, by max_rollout_batches="
        f"{algorithm.max_rollout_batches} or a greedy one; gad scores the answers it has: set "
        "algorithm.max_rollout_batches=1, or another advantage than remax",
    )
    _check_optim("critic.optim", config.critic.optim)


def _check_optim(key: str, optim: OptimConfig) -> None:
    for name in ("clip_grad", "eps"):
        _require(getattr(optim, name) > 0, f"{key}.{name}={getattr(optim, name)} must be greater than 0")
    for name in ("lr", "min_lr", "weight_decay", "warmup_steps"):
        _require(getattr(optim, name) >= 0, f"{key}.{name}={getattr(optim, name)} must not be negative")
    for name in ("beta1", "beta2"):
        _require(0 <= getattr(optim, name) < 1, f"{key}.{name}={getattr(optim, name)} must be at least 0 and below 1")
    _require(optim.min_lr <= optim.lr, f"{key}.min_lr={optim.min_lr} is above {key}.lr={optim.lr}")


def _check_rollout_batches(config: PolicyConfig) -> None:
    algorithm, longest = config.algorithm, config.rollout.max_new_tokens
    batches, buffer = algorithm.max_rollout_batches, algorithm.overlong_buffer
    assert batches is not None and buffer is not None
    _require(batches >= 1, f"algorithm.max_rollout_batches={batches} must be at least 1, which draws no more")
    _require(
        batches == 1 or config.rollout.group_size > 1,
        f"algorithm.max_rollout_batches={batches} replaces groups whose answers are all equal, as they are with "
        "rollout.group_size=1: set algorithm.max_rollout_batches=1, or larger groups",
    )
    _require(
        0 <= buffer <= longest,
        f"algorithm.overlong_buffer={buffer} must be between 0 and rollout.max_new_tokens={longest}",
    )
