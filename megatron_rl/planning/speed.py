"""How long an update takes, predicted from FLOPs, bytes and links. A model, not a measurement.

What it takes for granted stands in docs/performance.md. Symbols are those of activations.py; N are the loss-bearing
tokens of a micro-batch, V' the vocabulary's rows on a rank, P a rank's parameters, M the micro-batches of an update.
Seconds come by what they go to; each function's dictionary adds up to its whole.
"""

from dataclasses import dataclass

from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.activations import Build
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.machine import Machine
from megatron_rl.planning.parameters import (
    FLOAT32,
    buckets,
    layer_parameters,
    layers_per_chunk,
    optimizer_tensors,
    vocabulary_rows,
)
from megatron_rl.planning.vocabulary import kept_logits

# Products of the backward pass for one of the forward pass; of attention, which computes its scores again, 5 for 2.
BACKWARD, ATTENTION_BACKWARD = 2.0, 2.5


class Seconds(dict[str, float]):
    """By what they go to; what is missing takes none."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds({name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}})

    def __mul__(self, times: float) -> "Seconds":
        return Seconds({name: times * seconds for name, seconds in self.items()})

    @property
    def total(self) -> float:
        return sum(self.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The mean micro-batch of a rank: tokens, those of them that bear loss, sum of its sequences' squared lengths."""

    tokens: float
    loss_tokens: float
    squares: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of numbers of `width` bytes on a layout of ranks of a machine."""

    shape: ModelShape
    layout: Layout
    machine: Machine
    width: int
    build: Build = Build.te

    @property
    def stage_span(self) -> int:
        """Ranks of a pipeline stage; data-parallel copies lie within it, and the next stage so far away."""
        return self.layout.tp * self.layout.dp

    def stream(self, tokens: float) -> float:
        """Bytes of the hidden states between two layers, e T' H."""
        return self.width * rows(self.layout, tokens) * self.shape.hidden_size


def rows(layout: Layout, tokens: float) -> float:
    """T', unrounded."""
    return tokens / layout.tp if layout.sequence_parallel else tokens


def layer_flops(shape: ModelShape, layout: Layout, tokens: float) -> float:
    """Of a layer's matrix products, forward, on one rank: 2 T (2 (a + g) d H + 3 F H) / tp.

    Of experts 2 T' H (experts + 3 k F) in place of the MLP's.
    """
    tp = layout.tp
    attention = 2 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim * shape.hidden_size / tp
    experts = shape.experts
    if experts is None:
        return 2 * tokens * (attention + 3 * shape.ffn_hidden_size * shape.hidden_size / tp)
    chosen = experts.num_experts + 3 * experts.top_k * experts.ffn_hidden_size
    return 2 * tokens * attention + 2 * rows(layout, tokens) * chosen * shape.hidden_size


def attention_flops(shape: ModelShape, layout: Layout, squares: float) -> float:
    """Of both causal products, forward: 2 a d / tp times the sum of squared lengths."""
    return 2 * shape.num_heads * shape.head_dim * squares / layout.tp


def layer_bytes_moved(model: Model, tokens: float) -> float:
    """By what is no product, forward: e (n1 T' H + n2 T (a + g) d / tp + n3 T F / tp), F of k experts.

    te: 10, 2, 3: two norms and two sums; the rotation; SwiGLU, each one kernel. local: 20, 7, 5, operator by operator.
    """
    shape, tp = model.shape, model.layout.tp
    stream, rotated, mlp = (10, 2, 3) if model.build is Build.te else (20, 7, 5)
    inside = tokens * shape.ffn_hidden_size / tp
    if shape.experts is not None:
        inside = rows(model.layout, tokens) * shape.experts.top_k * shape.experts.ffn_hidden_size
    heads = (shape.num_heads + shape.num_kv_heads) * shape.head_dim / tp
    return stream * model.stream(tokens) + model.width * (rotated * tokens * heads + mlp * inside)


def layer_exchange(model: Model, tokens: float) -> Seconds:
    """Of one pass through a layer: two all-gathers and two reduce-scatters of e T H, or two all-reduces, over tp.

    Experts send the tokens to where they are, and back: twice e k T' H (ep - 1) / ep.
    """
    layout, machine = model.layout, model.machine
    stream = model.width * tokens * model.shape.hidden_size
    found = Seconds({"tensor parallel": 4 * machine.gather(stream, layout.tp, layout.tp)})
    if model.shape.experts is not None and layout.ep > 1:
        sent = model.shape.experts.top_k * model.stream(tokens)
        found["experts"] = 2 * machine.send(sent * (layout.ep - 1) / layout.ep, layout.ep * layout.etp)
    return found


def layer_seconds(model: Model, batch: Batch) -> tuple[Seconds, Seconds]:
    """One layer's forward and backward pass; with recomputation the second holds another first.

    Under sequence parallelism the backward pass gathers both inputs again, for the gradients of the weights. These are
    added to float32 ones: 8 + 2 e bytes for each parameter.
    """
    machine, layout = model.machine, model.layout
    forward = Seconds(
        {
            "products": layer_flops(model.shape, layout, batch.tokens) / machine.products,
            "attention": attention_flops(model.shape, layout, batch.squares) / machine.attention,
            "memory": layer_bytes_moved(model, batch.tokens) / machine.memory,
        }
    )
    exchanged = layer_exchange(model, batch.tokens)
    parameters = sum(map(sum, layer_parameters(model.shape, layout)))
    backward = Seconds(
        {
            "products": BACKWARD * forward["products"],
            "attention": ATTENTION_BACKWARD * forward["attention"],
            "memory": 2 * forward["memory"] + (8 + 2 * model.width) * parameters / machine.memory,
        }
    )
    forward, backward = forward + exchanged, backward + exchanged
    if layout.sequence_parallel:
        stream = model.width * batch.tokens * model.shape.hidden_size
        backward += Seconds({"tensor parallel": 2 * machine.gather(stream, layout.tp, layout.tp)})
    return forward, backward + forward if layout.recompute else backward


def head_seconds(model: Model, batch: Batch) -> tuple[Seconds, Seconds]:
    """The vocabulary operator on the last stage: one product forward, two backward, and one more where logits of more
    than 128 MiB are not kept; what reads and writes the logits, and the hidden states' way to all ranks and back.

    Bytes of a logit, forward and backward: te 3 e and 3 e; local, in float32, 20 and 20. A scalar head has no logits.
    """
    shape, machine, layout = model.shape, model.machine, model.layout
    if shape.scalar:
        return Seconds(), Seconds()
    rows = vocabulary_rows(shape, layout)
    logits = batch.loss_tokens * rows
    product = 2 * logits * shape.hidden_size / machine.products
    again = not kept_logits(int(batch.loss_tokens), rows, model.width)
    moved = logits * (3 * model.width if model.build is Build.te else 5 * FLOAT32) / machine.memory
    accumulated = (8 + 2 * model.width) * rows * shape.hidden_size / machine.memory
    stream = model.width * batch.tokens * shape.hidden_size
    passed = Seconds({"tensor parallel": machine.gather(stream, layout.tp, layout.tp)})
    forward = Seconds({"lm-head": product + moved}) + passed
    return forward, Seconds({"lm-head": (2 + again) * product + moved + accumulated}) + passed


def stage_seconds(model: Model, stage: int, batch: Batch) -> tuple[Seconds, Seconds]:
    """One micro-batch's forward and backward pass on a rank of a stage, all of its chunks."""
    layers = model.layout.vpp * layers_per_chunk(model.shape, model.layout, stage)
    forward, backward = (of * layers for of in layer_seconds(model, batch))
    if stage == model.layout.pp - 1:
        head = head_seconds(model, batch)
        forward, backward = forward + head[0], backward + head[1]
    return forward, backward


def pipelined(model: Model, stages: list[Seconds], micro_batches: int, stream: float, sends: int) -> Seconds:
    """M micro-batches through all stages, those of the slowest one in a row and the others' once at either end:

        M t_max + (sum_s t_s - t_max) / vpp

    The second term is the bubble, (pp - 1) / (M vpp) of the first where stages are equal. Each micro-batch also takes
    `sends` of `stream` bytes to the next stage for each of the vpp chunks, which nothing hides.
    """
    layout = model.layout
    slowest = max(stages, key=lambda of: of.total)
    whole = slowest * micro_batches
    if layout.pp > 1:
        whole["bubble"] = (sum(of.total for of in stages) - slowest.total) / layout.vpp
        each = model.machine.send(stream, 2 * model.stage_span)
        whole["stage to stage"] = sends * (micro_batches * layout.vpp + layout.pp - 2) * each
    return whole


def forward_seconds(model: Model, batch: Batch, micro_batches: int) -> Seconds:
    """A pass without gradient: log-probabilities, or a teacher's reading."""
    stages = [stage_seconds(model, stage, batch)[0] for stage in range(model.layout.pp)]
    return pipelined(model, stages, micro_batches, model.stream(batch.tokens), sends=1)


def update_seconds(model: Model, batch: Batch, micro_batches: int) -> Seconds:
    """Forward and backward passes of all micro-batches, gradients and weights between ranks, and Adam."""
    passes = [stage_seconds(model, stage, batch) for stage in range(model.layout.pp)]
    stages = [forward + backward for forward, backward in passes]
    whole = pipelined(model, stages, micro_batches, model.stream(batch.tokens), sends=2)
    after = [optimizer_seconds(model, stage) for stage in range(model.layout.pp)]
    return whole + max(after, key=lambda of: of.total)


def optimizer_seconds(model: Model, stage: int) -> Seconds:
    """After the last micro-batch; nothing of it overlaps with the passes. For each bucket, d ranks sharing it out,

        gradients: a reduce-scatter of 4 P bytes;    weights: an all-gather of e P
        Adam: 4 P set to zero, 4 P looked at, and P / d (4 norm + 8 clipping + 4 + 8 n + e) read and written

    n are the float32 numbers that Adam keeps of a weight.
    """
    machine, found = model.machine, Seconds()
    for bucket in buckets(model.shape, model.layout, stage):
        size, ranks = bucket.padded, bucket.shared_by
        share = 16 + 2 * FLOAT32 * optimizer_tensors(model.width) + model.width
        found += Seconds(
            {
                "gradients": machine.gather(FLOAT32 * size, ranks, model.stage_span),
                "weights": machine.gather(model.width * size, ranks, model.stage_span),
                "optimizer": (2 * FLOAT32 + share / ranks) * size / machine.memory,
            }
        )
    return found


def model_flops(shape: ModelShape, tokens: float, loss_tokens: float, squares: float) -> float:
    """Of an update, forward and backward, of the whole model and without recomputation: what MFU counts."""
    layout = Layout()
    layers = shape.num_layers * (layer_flops(shape, layout, tokens) + attention_flops(shape, layout, squares))
    head = 0 if shape.scalar else 2 * loss_tokens * shape.vocab_size * shape.hidden_size
    return (1 + BACKWARD) * (layers + head)
