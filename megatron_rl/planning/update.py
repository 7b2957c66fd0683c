"""The moments of one update in which most is in memory."""

from megatron_rl.ops.vocab_shard import VocabShard
from megatron_rl.planning.activations import (
    Build,
    Pass,
    kept_bytes,
    layer_backward_bytes,
    norm_backward_bytes,
    norm_bytes,
)
from megatron_rl.planning.parameters import FLOAT32, trained_model, vocabulary_rows
from megatron_rl.planning.vocabulary import head_backward_bytes, head_forward_bytes


def update_moments(
    at: Pass, stage: int, micro_batches: int, loss_tokens: int, *, entropy_bonus: bool = False
) -> dict[str, dict[str, int]]:
    """Per moment, the bytes beyond what is held between steps: `activations`, `lm-head` and `gradients` in passing.

    The forward pass is at its fullest in the loss, the backward pass in the loss, in the final norm, in the last layer
    or at the embedding. Of a tied embedding without pipeline the head's gradient waits for the embedding's.
    """
    layout, shape = at.layout, at.shape
    kept = kept_bytes(at, stage, micro_batches)
    embedding = 0 if shape.scalar else at.width * vocabulary_rows(shape, layout) * shape.hidden_size
    waiting = embedding if shape.tied and layout.pp == 1 else 0
    moments = {"a layer's backward pass": {"activations": kept + layer_backward_bytes(at), "gradients": waiting}}
    if stage == layout.pp - 1:
        kept_norm = kept + norm_bytes(at, at.rows, shape.hidden_size)
        moments["the final norm"] = {"activations": kept_norm + norm_backward_bytes(at), "gradients": waiting}
        moments["the loss"] = {"activations": kept_norm, **_loss(at, loss_tokens, entropy_bonus=entropy_bonus)}
    if stage == 0:
        passes = layout.in_flight(stage, micro_batches)
        others = kept * (passes - 1) // passes
        rows = at.width * vocabulary_rows(shape, layout) * shape.hidden_size
        moments["the embedding"] = {"activations": others + at.stream, "gradients": rows + waiting}
    if at.build is Build.local:
        # gloo copies what it reduces.
        moments["the reduction"] = {"gradients": trained_model(shape, layout, stage, at.width).gradients}
    return moments


def _loss(at: Pass, loss_tokens: int, *, entropy_bonus: bool) -> dict[str, int]:
    """The fuller of the loss's two passes. A critic has its hidden states in float32, and their gradient."""
    hidden = at.shape.hidden_size
    if at.shape.scalar:
        return {"activations": (1 + 1) * FLOAT32 * at.tokens * hidden}
    shard = VocabShard.of(at.shape.vocab_size, vocabulary_rows(at.shape, at.layout), 0).size
    sizes = (loss_tokens, hidden, shard, at.width)
    backward = head_backward_bytes(*sizes, at.build, entropy_bonus=entropy_bonus)
    return {"lm-head": max(head_forward_bytes(*sizes), backward)}
