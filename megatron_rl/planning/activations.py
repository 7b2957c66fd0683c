"""What a micro-batch leaves in memory for its backward pass, and what comes on top of it.

Symbols: T tokens of a micro-batch; T' = T / tp of them with sequence parallelism, otherwise T; H hidden size, F size
of the MLP, d head size, a and g query and key/value heads, of which a rank has 1 / tp; e bytes of a number of the
model's dtype. Of a mixture of experts F is an expert's, and A = k T' etp the tokens that a rank's experts see: each
token chooses k, and all experts are assumed to be chosen equally often. Two builds of a layer are told apart:

* `local`: megatron-core's local spec with models/attention.py and models/torch_layers.py, as it runs on a CPU. Held
  against measurements.
* `te`: Transformer Engine's on CUDA, with fused norm and projection, fused SwiGLU and flash attention. Read off the
  modules, never measured.
"""

from dataclasses import dataclass
from enum import StrEnum

from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.parameters import FLOAT32, layers_per_chunk


class Build(StrEnum):
    """What a layer is made of."""

    local = "local"
    te = "te"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One micro-batch of `tokens` through a model on one rank."""

    shape: ModelShape
    layout: Layout
    build: Build
    width: int  # bytes of a number of the model's dtype
    tokens: int

    @property
    def rows(self) -> int:
        """T'."""
        return self.layout.split(self.tokens)

    @property
    def stream(self) -> int:
        """The hidden states between two layers: e T' H."""
        return self.width * self.rows * self.shape.hidden_size

    @property
    def chosen(self) -> int:
        """A; 0 in a dense model."""
        experts = self.shape.experts
        return 0 if experts is None else experts.top_k * self.rows * self.layout.etp

    @property
    def mlp(self) -> int:
        """One tensor of the MLP's inside: e T F / tp, or of experts e A F / etp."""
        if self.shape.experts is None:
            return self.width * self.tokens * self.shape.ffn_hidden_size // self.layout.tp
        return self.width * self.chosen * self.shape.experts.ffn_hidden_size // self.layout.etp

    @property
    def dispatched(self) -> int:
        """The hidden states as experts take them: e A H."""
        return self.width * self.chosen * self.shape.hidden_size

    @property
    def gathered(self) -> int:
        """Under sequence parallelism, the buffer in which megatron-core puts the hidden states together: e T H."""
        return self.width * self.tokens * self.shape.hidden_size if self.layout.sequence_parallel else 0


def norm_bytes(at: Pass, rows: int, columns: int) -> int:
    """Of an RMSNorm, without its output: the input and 1 / rms, e rows columns + 4 rows."""
    return rows * (at.width * columns + FLOAT32)


def attention_bytes(at: Pass) -> int:
    """norm + e T' H (its output) + e T d (3 a + 3 g) / tp + 4 T a / tp (log-sum-exp of the softmax).

    The factors of a and g: the projection's output, of which the values are a part; rotated queries and keys; the
    attention's output. Norms of queries and keys add their own.
    """
    shape, tp, tokens = at.shape, at.layout.tp, at.tokens
    heads, kv_heads, size = shape.num_heads // tp, shape.num_kv_heads // tp, shape.head_dim
    kept = norm_bytes(at, at.rows, shape.hidden_size) + at.stream
    kept += at.width * tokens * size * 3 * (heads + kv_heads) + FLOAT32 * tokens * heads
    if shape.family.qk_norm:
        kept += norm_bytes(at, tokens * heads, size) + norm_bytes(at, tokens * kv_heads, size)
        # Of what the norms read, this is part of the projection's output.
        views = kv_heads if at.build is Build.local else heads + kv_heads
        kept -= at.width * tokens * size * views
    return kept


def mlp_bytes(at: Pass) -> int:
    """norm + e T' H (its output) + 3 e T F / tp, or of experts norm + e T' H + 4 T' experts + e A H + n e A F / etp.

    The gate and up projections, and their product; of experts, local has the product with the router's weight too, so
    that n is 4, where te's kernel takes it in.
    """
    kept = norm_bytes(at, at.rows, at.shape.hidden_size) + at.stream
    if at.shape.experts is None:
        return kept + 3 * at.mlp
    router = FLOAT32 * at.rows * at.shape.experts.num_experts
    return kept + router + at.dispatched + (3 if at.build is Build.te else 4) * at.mlp


def layer_bytes(at: Pass) -> int:
    """What one layer keeps for its backward pass."""
    return attention_bytes(at) + mlp_bytes(at)


def kept_bytes(at: Pass, stage: int, micro_batches: int) -> int:
    """What the passes in flight on a stage keep, that of `in_flight` chunks of l layers each:

        in_flight l layer_bytes,    or with recomputation    in_flight l e T' H

    and, local, the rotation, 3 / 2 e T d, which all layers share. A pipeline's stage also has what it sent, without
    `deallocate_pipeline_outputs`. Layers of experts whose backward pass is over keep e A H under recomputation, in
    place of e T' H.
    """
    layers, passes = layers_per_chunk(at.shape, at.layout, stage), at.layout.in_flight(stage, micro_batches)
    kept = passes * layers * (at.stream if at.layout.recompute else layer_bytes(at))
    if at.layout.recompute:
        kept += (layers - 1) * max(at.dispatched - at.stream, 0)
    if at.build is Build.local:
        kept += passes * at.width * at.tokens * at.shape.head_dim * 3 // 2
        kept += passes * at.stream * (stage < at.layout.pp - 1)
    return kept


def layer_backward_bytes(at: Pass) -> int:
    """On top of what is kept, in the middle of a layer's backward pass: e T' H + 2 e T F / tp.

    The gradient of the layer's output and those of the two projections, whose product is gone by then. Of experts
    3 e A H more, their inputs before the exchange, their outputs and the gradient of these; on a CPU experts take
    turns, and what is inside of them does not add up. With recomputation the layer's own tensors, all but its input,
    and its output computed again: layer_bytes.
    """
    again = layer_bytes(at) if at.layout.recompute else 0
    inside = 0 if at.shape.experts is not None and at.build is Build.local else 2 * at.mlp
    return at.stream + inside + 3 * at.dispatched + at.gathered + again


def norm_backward_bytes(at: Pass) -> int:
    """On top of what is kept and the norm's own, in the backward pass of the final norm.

    The gradients of its output and input, 2 e T' H; local holds two float32 tensors more, 8 T' H, of which the second
    is the input's gradient where that is float32.
    """
    if at.build is Build.te:
        return 2 * at.stream
    own = at.width if at.width < FLOAT32 else 0
    return at.stream + at.rows * at.shape.hidden_size * (2 * FLOAT32 + own)
