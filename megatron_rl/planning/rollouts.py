"""What an engine that answers prompts holds on a trainer's rank."""

from dataclasses import dataclass

from megatron_rl.config.rules import Config
from megatron_rl.config.schema import EngineName, RolloutTrainerConfig
from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.parameters import FLOAT32, model_parameters

GIB = 2**30
# Tensors [sequences, vocabulary] in float32 around one draw: logits, log-probabilities, their sorted and masked forms.
DRAW_TENSORS = 5
ROOM = 64  # tokens that keys and values have room for beyond those that are there


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBytes:
    """Of an engine on one rank; zeros where it runs elsewhere."""

    weights: int = 0
    keys_values: int = 0
    drawing: int = 0
    stays: bool = False  # keys and values are held between rollouts too


def keys_values(shape: ModelShape, width: int, positions: int) -> int:
    """Of one sequence: 2 layers e g d positions, g heads of d columns for keys and as many for values."""
    return 2 * shape.num_layers * width * shape.num_kv_heads * shape.head_dim * positions


def prefill(shape: ModelShape, width: int, tokens: int) -> int:
    """While prompts are read, in one layer: e tokens (3 F + 4 H), F of as many experts as a token chooses."""
    experts = shape.experts
    ffn = shape.ffn_hidden_size if experts is None else experts.top_k * experts.ffn_hidden_size
    return width * tokens * (3 * ffn + 4 * shape.hidden_size)


def longest_answer(config: Config) -> int:
    """Tokens of the longest prompt with the longest answer to it."""
    return config.data.max_prompt_tokens + max(config.rollout.max_new_tokens, config.eval.max_new_tokens or 0)


def answers(config: Config) -> bool:
    """Whether a run asks an engine at all: to learn, or to be evaluated."""
    return isinstance(config, RolloutTrainerConfig) or config.data.val is not None


def sequences_at_once(config: Config, world: int) -> int:
    """Answers that one rank of the engine `hf` draws together, at most; held-out problems may fill its batches."""
    if config.data.val is not None or not isinstance(config, RolloutTrainerConfig):
        return config.rollout.max_sequences
    prompts = -(-config.train.batch_size // world)
    return min(config.rollout.max_sequences, prompts * config.rollout.group_size)


def engine_on_rank(config: Config, shape: ModelShape, width: int, world: int) -> EngineBytes:
    """hf: the whole model, and keys and values of a batch while it is drawn. vllm: a share of the model, and the cache.

    A server's memory is not the trainer's. What vLLM takes for its own work, CUDA graphs above all, is not known here.
    """
    rollout, weights = config.rollout, width * model_parameters(shape)
    if not answers(config) or rollout.engine is EngineName.vllm_server:
        return EngineBytes()
    if rollout.engine is EngineName.vllm:
        cache = int(rollout.vllm.kv_cache_gb * GIB)
        return EngineBytes(weights=weights // rollout.vllm.tp, keys_values=cache, stays=True)
    sequences = sequences_at_once(config, world)
    cache = sequences * keys_values(shape, width, longest_answer(config) - 1 + ROOM)
    # A layer's keys are copied to make room.
    drawing = DRAW_TENSORS * FLOAT32 * sequences * shape.vocab_size + cache // (2 * shape.num_layers)
    drawing = max(drawing, prefill(shape, width, sequences * config.data.max_prompt_tokens))
    return EngineBytes(weights=weights, keys_values=cache, drawing=drawing)


def served_bytes(config: Config, shape: ModelShape, width: int) -> int:
    """What a process of a vLLM server holds, on GPUs of its own."""
    rollout = config.rollout
    return width * model_parameters(shape) // rollout.vllm.tp + int(rollout.vllm.kv_cache_gb * GIB)
