"""Every option there is, by trainer. A section is a dataclass; a trainer's config is a dataclass of sections."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from megatron_rl.config.average import AverageConfig
from megatron_rl.config.critic import CriticConfig, DiscriminatorConfig, PpoOptions
from megatron_rl.config.expert import ExpertConfig
from megatron_rl.config.optim import OptimConfig
from megatron_rl.config.sdpo import DistillConfig, RepromptConfig, TeacherConfig


class DType(StrEnum):
    """What weights and activations are computed in. Gradients, master weights and losses are always float32."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class EngineName(StrEnum):
    """What answers prompts: transformers, vLLM in the trainer's processes or in servers; auto: the first two.

    `auto` is vLLM where it is installed and transformers otherwise.
    """

    auto = "auto"
    hf = "hf"
    vllm = "vllm"
    vllm_server = "vllm_server"


class TruncationSide(StrEnum):
    """What happens to a prompt longer than `data.max_prompt_tokens`."""

    left = "left"
    right = "right"
    error = "error"


class Chat(StrEnum):
    """Whether prompts go through the tokenizer's chat template. `auto`: when it has one."""

    auto = "auto"
    always = "always"
    never = "never"


class Algorithm(StrEnum):
    """Named policy-gradient algorithms; unset options take the values of the paper that the name stands for."""

    grpo = "grpo"
    dr_grpo = "dr_grpo"
    dapo = "dapo"
    gspo = "gspo"
    cispo = "cispo"
    sapo = "sapo"
    gmpo = "gmpo"
    dppo_tv = "dppo_tv"
    dppo_kl = "dppo_kl"
    dro = "dro"
    ppo = "ppo"
    rloo = "rloo"
    opo = "opo"
    gpg = "gpg"
    remax = "remax"
    pass_at_k = "pass_at_k"
    reinforce_plus_plus = "reinforce_plus_plus"
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"


class Advantage(StrEnum):
    """How rewards are compared; see algorithms/advantages.py."""

    grpo = "grpo"
    rloo = "rloo"
    opo = "opo"
    gpg = "gpg"
    remax = "remax"
    pass_at_k = "pass_at_k"
    reinforce_plus_plus = "reinforce_plus_plus"
    reinforce_plus_plus_baseline = "reinforce_plus_plus_baseline"
    gae = "gae"  # not a comparison: it needs a critic


class Loss(StrEnum):
    """Policy losses; see algorithms/policy_loss.py."""

    ppo_clip = "ppo_clip"
    gspo = "gspo"
    geo_mean = "geo_mean"
    sapo = "sapo"
    reinforce = "reinforce"
    cispo = "cispo"
    dppo_tv = "dppo_tv"
    dppo_kl = "dppo_kl"
    dro = "dro"


class EmaAxis(StrEnum):
    """Along what importance weights are smoothed: nothing, the tokens of a response, or the updates of a sample."""

    none = "none"
    token = "token"
    step = "step"


class EmaInit(StrEnum):
    """What the average starts from: one, or the first weight itself."""

    one = "one"
    first = "first"


class EmaGradient(StrEnum):
    """The slope of a smoothed weight; see algorithms/ema_weights.py."""

    full = "full"
    current = "current"
    straight_through = "straight_through"


class KLGradient(StrEnum):
    """The slope of the estimate; see algorithms/kl.py."""

    naive = "naive"
    straight_through_k2 = "straight_through_k2"
    score_function = "score_function"
    is_ratio = "is_ratio"


class CorrectionLevel(StrEnum):
    """Which ratio weighs a token that another policy drew: none, its own, or that of its whole response."""

    none = "none"
    token = "token"
    sequence = "sequence"


class KLPlace(StrEnum):
    """Where the distance to the reference counts: nowhere, as a term of the loss, or off the reward."""

    none = "none"
    loss = "loss"
    reward = "reward"


class KLEstimator(StrEnum):
    """Schulman's estimators of KL(policy || reference) from samples of the policy; see algorithms/kl.py."""

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    abs = "abs"


PRETRAINED, RANDOM = "pretrained", "random"


@dataclass(kw_only=True)
class ModelConfig:
    path: str = (
        MISSING  # Hugging Face directory: config.json, tokenizer and, unless `weights` says other, *.safetensors
    )
    weights: str = (
        PRETRAINED  # pretrained, random, or a run directory (its latest checkpoint) or checkpoint to start from
    )
    seed: int = 1  # of random weights
    dtype: DType = DType.float32


@dataclass(kw_only=True)
class ParallelConfig:
    """Ranks along each axis."""

    tp: int = 1
    pp: int = 1
    dp: int | None = None  # null: what the world has beyond tp * pp
    vpp: int = 1  # model chunks per pipeline stage, interleaved
    ep: int = 1  # ranks that share out the experts of a layer, among the tp * dp of a stage
    etp: int = 1  # tensor-parallel ranks of one expert
    sequence_parallel: bool = False
    recompute: bool = False  # keep only each layer's input, and compute its activations again in the backward pass


@dataclass(kw_only=True)
class HeldOutConfig:
    """Held-out problems: `val` is a .jsonl or .parquet file, or a `reasoning-gym:task`."""

    val: str | None = None
    val_task: dict[str, Any] = field(default_factory=dict)  # size, seed and options of a reasoning-gym task
    prompt_key: str = "prompt"
    template: str | None = None  # the prompt is put into: r1_zero, question_only, or a text file with {question}
    chat: Chat = Chat.auto
    max_prompt_tokens: int = 512
    truncation_side: TruncationSide = TruncationSide.error


@dataclass(kw_only=True)
class DataConfig(HeldOutConfig):
    """And problems to train on: `train` is named as `val` is."""

    train: str = MISSING
    task: dict[str, Any] = field(default_factory=dict)  # as val_task


@dataclass(kw_only=True)
class PairDataConfig(DataConfig):
    response_key: str = "response"


@dataclass(kw_only=True)
class SftDataConfig(DataConfig):
    response_key: str | None = "response"  # null: the prompt is a conversation that ends with the assistant's message


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = MISSING
    batch_size: int = MISSING  # prompts (grpo) or examples (sft) per step, over all ranks
    max_tokens_per_micro_batch: int = 8192  # per data-parallel rank
    seed: int = 1
    profile: list[int] = field(default_factory=list)  # steps whose trace torch.profiler writes to run.dir/profile


@dataclass(kw_only=True)
class RolloutTrainConfig(TrainConfig):
    mini_batches_per_step: int = 1  # that a rollout batch is cut into, one optimizer step each
    epochs_per_step: int = 1  # passes over a rollout batch


@dataclass(kw_only=True)
class LikelihoodTrainConfig(TrainConfig):
    aggregation: str = "token-mean"  # how tokens are weighed, see the docs
    normalizer: float | None = None  # of seq-mean-token-sum-norm: what each sequence's sum is divided by


@dataclass(kw_only=True)
class ExpertTrainConfig(LikelihoodTrainConfig, RolloutTrainConfig):
    """Of an expert iteration's step."""


@dataclass(kw_only=True)
class ServerConfig:
    """Of engine vllm_server: the trainer starts servers beside rank 0, or asks running ones."""

    urls: list[str] = field(default_factory=list)  # running servers; empty: the trainer starts its own
    count: int = 1  # servers that the trainer starts
    host: str = "127.0.0.1"  # where those listen; who reaches it can change the weights and read every answer
    gpus: list[int] = field(default_factory=list)  # of the servers that are started, rollout.vllm.tp each; empty: none
    python: str | None = None  # an interpreter that has vLLM; null: the trainer's own
    exchange: str | None = None  # a folder that trainer and servers share, for weights; null: this host's memory
    broadcast: bool = False  # weights go by NCCL, or gloo on a CPU, and not through files: a server that dies has none
    start_timeout_s: float = 600.0  # for a start, and for an update of the weights
    timeout_s: float = 120.0  # a server that has requests and draws no token for so long counts as dead
    restarts: int = 3  # of a server between two weight updates
    ahead: bool = (
        False  # draw the next step's rollouts while this step's are learned from, with weights of one step ago
    )


@dataclass(kw_only=True)
class VLLMConfig:
    tp: int = 1  # ranks that share one engine; of a server: its processes
    kv_cache_gb: float = 1.0  # GiB of keys and values on each rank, or in each process of a server
    sleep: bool = False  # the trainer frees gradients and optimizer state while the engine answers, and the reverse
    server: ServerConfig = field(default_factory=ServerConfig)


@dataclass(kw_only=True)
class SamplingConfig:
    """How an engine answers."""

    engine: EngineName = EngineName.auto
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    stop: list[str] = field(default_factory=list)  # texts that end a response, which keeps them and has no end token
    max_sequences: int = 256  # generated together on one rank, or in flight at one server


@dataclass(kw_only=True)
class RolloutConfig(SamplingConfig):
    group_size: int = 8  # responses per prompt
    parity_every: int = 50  # steps between comparisons of the engine's and the trainer's log-probabilities
    parity_tolerance: float | None = None  # largest difference allowed; null: 1e-3 in float32, 0.25 in bfloat16


@dataclass(kw_only=True)
class RewardConfig:
    name: str = "exact"  # a built-in name, or module:function
    options: dict[str, Any] = field(default_factory=dict)
    workers: int = 2  # processes per rank
    deadline_s: float = 10.0  # per call; then the process is killed
    memory_gb: float | None = 4.0  # GiB of address space in each process of a reward; null: no limit


@dataclass(kw_only=True)
class AlgorithmConfig:
    """`null` means: as the algorithm's paper has it."""

    name: Algorithm = Algorithm.grpo
    advantage: Advantage | None = None
    loss: Loss | None = None
    clip_low: float | None = None
    clip_high: float | None = None
    dual_clip: float | None = None  # of ppo_clip; 0 turns it off
    temperature_positive: float = 1.0  # of sapo's gate, where the advantage is positive
    temperature_negative: float = 1.05
    max_ratio: float = 20.0  # of dppo_tv and dppo_kl
    pull: float = 0.1  # of dro, back to the old policy; its paper's tau
    normalize_by_std: bool | None = None  # of grpo and pass_at_k
    discount: float = 1.0  # of reinforce_plus_plus, per token
    aggregation: str | None = None  # how tokens are weighed, see the docs
    entropy_coeff: float = 0.0
    max_rollout_batches: int | None = None  # drawn per step at most, to replace groups that teach nothing; 1: no more
    overlong_buffer: int | None = None  # tokens before the limit from which on length costs reward; 0 for none
    overlong_factor: float = 1.0  # what the longest response loses
    drop_truncated: bool | None = None  # responses cut off at the limit bear no loss


@dataclass(kw_only=True)
class KLConfig:
    """Keeps the policy near a frozen reference: the model that training starts from."""

    where: KLPlace = KLPlace.none
    estimator: KLEstimator = KLEstimator.k3
    gradient: KLGradient = KLGradient.naive  # of the loss
    coeff: float = 0.001


@dataclass(kw_only=True)
class EmaConfig:
    """Importance weights smoothed by w' = beta w + (1 - beta) w': the larger beta, the less."""

    axis: EmaAxis = EmaAxis.none
    beta: float = 0.9
    init: EmaInit = EmaInit.one
    gradient: EmaGradient | None = None  # null: full on the token axis, current on the step axis


@dataclass(kw_only=True)
class KeptAverageConfig(AverageConfig):
    """An average kept beside the weights that are trained: saved, evaluated as val_average/*, written to hf_average."""

    enabled: bool = False


@dataclass(kw_only=True)
class RolloutCorrectionConfig:
    """What is done about rollouts that were not drawn from the policy which the update starts from."""

    level: CorrectionLevel = CorrectionLevel.none  # importance weights on the loss
    high: float = 2.0  # larger weights are cut to it
    low: float | None = None  # with it, weights outside of [low, high] are 0 instead (IcePop)
    normalize: bool = False  # divide the weights by their mean over the batch
    reject: dict[str, Any] = field(default_factory=dict)  # criterion: bound, as seq_mean_k3: 0.1; beyond it no loss
    bypass: bool = False  # the update starts from the engine's log-probabilities, without a pass of the trainer's own
    opsm_delta: float | None = None  # bad responses whose log-probabilities fell by more than this on average: no loss


@dataclass(kw_only=True)
class AnsweringConfig:
    """Held-out problems are answered greedily, and with `samples` draws for pass@k."""

    limit: int | None = None  # problems; null: all
    samples: int = 0  # draws per problem for pass@1..samples; 0: greedy only
    max_new_tokens: int | None = None  # null: rollout.max_new_tokens
    seed: int = 1  # of the draws


@dataclass(kw_only=True)
class EvalConfig(AnsweringConfig):
    every: int = 0  # steps; 0: only before the first and after the last


@dataclass(kw_only=True)
class MeasureConfig(AnsweringConfig):
    """Of `megatron-rl eval`."""

    shots: int = 0  # solved examples before each problem
    shots_from: str | None = None  # where they are: the first rows of a file, with prompts as those of the problems
    shots_response_key: str = "response"
    chunk: int = 64  # problems answered between two writes; a stopped evaluation goes on from the last


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 0  # steps; 0: only after the last
    keep: int = 2  # the newest
    keep_every: int = 0  # and those of every so many steps; 0: none
    background: bool = False  # write while training goes on; costs the memory of a copy
    load: str | None = None  # a checkpoint or run directory to continue, where run.dir has no checkpoint of its own
    best: str | None = None  # a figure of evaluations, as val/accuracy: the weights where it was largest are kept


@dataclass(kw_only=True)
class GuardsConfig:
    """What a run is watched for; docs/guards.md has the rules."""

    ignore: list[str] = field(default_factory=list)  # rules that are not watched
    stop: list[str] = field(default_factory=list)  # rules that stop the run where they would warn
    limits: dict[str, float] = field(default_factory=dict)  # rule: limit in place of the table's
    max_skipped_steps: int = 3  # steps in a row with an update that was not finite; then the run stops


@dataclass(kw_only=True)
class LogConfig:
    """TensorBoard and metrics.jsonl are always written."""

    wandb: str | None = None  # a Weights & Biases project to log to as well
    histograms_every: int = 10  # steps between distributions; 0 for none


@dataclass(kw_only=True)
class PlaceConfig:
    dir: str = MISSING
    resume: bool = True  # continue what the directory holds: from its latest checkpoint, or after its last answers
    hang_timeout_s: float = 120.0  # without progress on any rank, or a sign of life from one, end the run; 0: never


@dataclass(kw_only=True)
class RunConfig(PlaceConfig):
    stop_after: int | None = None  # end after this step, as if interrupted; the run can be continued
    allow_changes: bool = False  # continue although options that change the mathematics are others now


@dataclass(kw_only=True)
class TrainerConfig:
    """What every trainer has."""

    trainer: str = MISSING
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guards: GuardsConfig = field(default_factory=GuardsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass(kw_only=True)
class SftConfig(TrainerConfig):
    """Supervised fine-tuning on prompt/response pairs."""

    trainer: str = "sft"
    data: SftDataConfig = field(default_factory=SftDataConfig)
    train: LikelihoodTrainConfig = field(default_factory=LikelihoodTrainConfig)
    average: KeptAverageConfig = field(default_factory=KeptAverageConfig)


@dataclass(kw_only=True)
class RolloutTrainerConfig(TrainerConfig):
    """What trainers have that learn from their own answers."""

    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)


@dataclass(kw_only=True)
class ExpertIterationConfig(RolloutTrainerConfig):
    """Answer, keep what is right, learn it as if it had been demonstrated."""

    trainer: str = "expert_iteration"
    train: ExpertTrainConfig = field(default_factory=ExpertTrainConfig)
    expert: ExpertConfig = field(default_factory=ExpertConfig)
    average: KeptAverageConfig = field(default_factory=KeptAverageConfig)


# Those that learn the likelihood of given tokens, whoever wrote them.
LikelihoodConfig = SftConfig | ExpertIterationConfig


@dataclass(kw_only=True)
class PolicyConfig(RolloutTrainerConfig):
    """What those of them have that compare answers and policies."""

    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)


@dataclass(kw_only=True)
class PolicyGradientConfig(PolicyConfig):
    """What those have that learn from rewards alone."""

    kl: KLConfig = field(default_factory=KLConfig)


@dataclass(kw_only=True)
class GrpoConfig(PolicyGradientConfig):
    """Group-relative policy optimisation and its family."""

    trainer: str = "grpo"
    ema: EmaConfig = field(default_factory=EmaConfig)
    average: KeptAverageConfig = field(default_factory=KeptAverageConfig)


@dataclass(kw_only=True)
class PpoConfig(GrpoConfig):
    """Proximal policy optimisation: a critic says what was to be expected."""

    trainer: str = "ppo"
    algorithm: AlgorithmConfig = field(default_factory=lambda: AlgorithmConfig(name=Algorithm.ppo))
    ppo: PpoOptions = field(default_factory=PpoOptions)
    critic: CriticConfig = field(default_factory=CriticConfig)


@dataclass(kw_only=True)
class GadConfig(PolicyGradientConfig):
    """Generative adversarial distillation: the policy is rewarded by a critic that tells it from a teacher."""

    trainer: str = "gad"
    data: PairDataConfig = field(default_factory=PairDataConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)


@dataclass(kw_only=True)
class SdpoConfig(PolicyConfig):
    """Self-distillation policy optimisation; `algorithm` is read where distill.weight is below 1."""

    trainer: str = "sdpo"
    distill: DistillConfig = field(default_factory=DistillConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    reprompt: RepromptConfig = field(default_factory=RepromptConfig)


@dataclass(kw_only=True)
class EvaluationConfig:
    """One evaluation, and no training: what `megatron-rl eval` makes of its arguments."""

    trainer: str = "eval"
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: HeldOutConfig = field(default_factory=HeldOutConfig)
    rollout: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    eval: MeasureConfig = field(default_factory=MeasureConfig)
    run: PlaceConfig = field(default_factory=PlaceConfig)


SCHEMAS: dict[str, type[TrainerConfig] | type[EvaluationConfig]] = {
    "sft": SftConfig,
    "grpo": GrpoConfig,
    "ppo": PpoConfig,
    "gad": GadConfig,
    "sdpo": SdpoConfig,
    "expert_iteration": ExpertIterationConfig,
    "eval": EvaluationConfig,
}
