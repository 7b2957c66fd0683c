"""What the vocabulary operators hold (ops/linear_stats.py, ops/divergence.py): chunks of logits, never all of them.

N tokens bear loss; V' rows of the vocabulary lie on this rank, C of them in a chunk; H and e as in activations.py.
"""

from megatron_rl.ops.logit_stream import CPU_CHUNK, GPU_CHUNK, KEPT_BYTES
from megatron_rl.planning.activations import Build
from megatron_rl.planning.parameters import FLOAT32


def kept_logits(tokens: int, rows: int, width: int) -> int:
    """e N V', kept for the backward pass where that is at most 128 MiB; nothing where it is more."""
    size = tokens * rows * width
    return size if size <= KEPT_BYTES else 0


def chunk_columns(rows: int, build: Build) -> int:
    """C."""
    return min(CPU_CHUNK if build is Build.local else GPU_CHUNK, rows)


def chunk_buffers(tokens: int, rows: int, width: int, build: Build) -> int:
    """The chunk of logits in float32, and the narrower product that it is made of, unless kept: 4 N C (+ e N C)."""
    product = width if width < FLOAT32 and not kept_logits(tokens, rows, width) else 0
    return tokens * chunk_columns(rows, build) * (FLOAT32 + product)


def head_forward_bytes(tokens: int, hidden: int, rows: int, width: int, build: Build) -> int:
    """Kept logits, the buffers of a chunk, its exponentials 4 N C, and the loss-bearing hidden states e N H."""
    exponentials = FLOAT32 * tokens * chunk_columns(rows, build)
    kept = kept_logits(tokens, rows, width)
    return kept + chunk_buffers(tokens, rows, width, build) + exponentials + width * tokens * hidden


def head_backward_bytes(
    tokens: int, hidden: int, rows: int, width: int, build: Build, *, entropy_bonus: bool = False
) -> int:
    """Kept logits, the buffers of a chunk, and the hidden states' gradient, summed in float32: 4 N H.

    The weight's goes to megatron-core's. Of a narrower dtype come a chunk's gradient, its product and, on a
    CPU, the chunk of the weight by columns. An entropy bonus takes one more chunk, 4 N C.
    """
    columns = chunk_columns(rows, build)
    gradient = FLOAT32 * tokens * hidden
    narrow = 0
    if width < FLOAT32:
        narrow = width * (tokens * columns + tokens * hidden + (columns * hidden if build is Build.local else 0))
    bonus = FLOAT32 * tokens * columns if entropy_bonus else 0
    kept = kept_logits(tokens, rows, width)
    states = width * tokens * hidden
    return kept + chunk_buffers(tokens, rows, width, build) + states + gradient + narrow + bonus


def teacher_head_bytes(
    tokens: int, hidden: int, rows: int, width: int, build: Build, *, listed: int, full: bool, mixed: bool
) -> int:
    """A second head on the same tokens, beside the student's: its hidden states e N H, and what its chunks take.

    Both heads have a list of k ids, 12 N k. What waits to enter one is half as long and takes 20 bytes each, and to
    sort both together 32. The `full` vocabulary keeps the teacher's logits and three more chunks in float32. A `mixed`
    head is two side by side: 2 e V' H, and e N H more.
    """
    columns = chunk_columns(rows, build)
    states = (1 + mixed) * width * tokens * hidden + (2 * width * rows * hidden if mixed else 0)
    lists = tokens * listed * (2 * 12 + 20 // 2 + 32 * 3 // 2)
    chunks = chunk_buffers(tokens, rows, width, build) + FLOAT32 * tokens * columns
    if full:
        chunks += kept_logits(tokens, rows, width) + 3 * FLOAT32 * tokens * columns
    return states + lists + chunks
