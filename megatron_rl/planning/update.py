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
from megatron_rl.planning.parameters import FLOAT32, buckets, layers_per_chunk, vocabulary_rows
from megatron_rl.planning.vocabulary import head_backward_bytes, head_forward_bytes


def update_moments(
    at: Pass, stage: int, micro_batches: int, loss_tokens: int, *, entropy_bonus: bool = False
) -> dict[str, dict[str, int]]:
    """Per moment, the bytes beyond what is held between steps: `activations`, `lm-head` and `gradients` in passing.

    The forward pass is at its fullest in the loss, the backward pass in the loss, in the final norm or in the last
    layer.
    """
    layout, shape = at.layout, at.shape
    kept = kept_bytes(at, stage, micro_batches)
    moments = {"a layer's backward pass": {"activations": kept + layer_backward_bytes(at)}}
    if stage == layout.pp - 1:
        with_norm = kept + norm_bytes(at, at.rows, shape.hidden_size) + at.gathered
        moments["the final norm"] = {"activations": with_norm + norm_backward_bytes(at)}
        moments["the loss"] = _in_the_loss(at, with_norm, loss_tokens, entropy_bonus=entropy_bonus)
    if at.build is Build.local:
        shared = (bucket.padded for bucket in buckets(shape, layout, stage) if bucket.shared_by > 1)
        left = layers_per_chunk(shape, layout, stage) * at.dispatched if layout.recompute else 0
        copied = FLOAT32 * max(shared, default=0)  # which gloo reduces
        moments["the reduction"] = {"activations": left, "gradients": copied}
    return moments


def _in_the_loss(at: Pass, kept: int, loss_tokens: int, *, entropy_bonus: bool) -> dict[str, int]:
    """The fuller of the loss's two passes. A critic's head reads float32 hidden states, and gives them a gradient."""
    hidden = at.shape.hidden_size
    if at.shape.scalar:
        return {"activations": kept + 2 * FLOAT32 * at.tokens * hidden}
    shard = VocabShard.of(at.shape.vocab_size, vocabulary_rows(at.shape, at.layout), 0).size
    sizes = (loss_tokens, hidden, shard, at.width)
    backward = head_backward_bytes(*sizes, at.build, entropy_bonus=entropy_bonus)
    return {"activations": kept, "lm-head": max(head_forward_bytes(*sizes, at.build), backward)}
