"""What the vocabulary operators hold (ops/linear_stats.py, ops/divergence.py): chunks of logits, never all of them.

N tokens bear loss; V' rows of the vocabulary lie on this rank, C of them in a chunk; H and e as in activations.py.
"""

from megatron_rl.ops.logit_stream import KEPT_BYTES, VOCABULARY_CHUNK
from megatron_rl.planning.activations import Build
from megatron_rl.planning.parameters import FLOAT32


def kept_logits(tokens: int, rows: int, width: int) -> int:
    """e N V', kept for the backward pass where that is at most 128 MiB; nothing where it is more."""
    size = tokens * rows * width
    return size if size <= KEPT_BYTES else 0


def chunk_buffers(tokens: int, rows: int, width: int) -> int:
    """The chunk of logits in float32, and the product in a narrower dtype that it is made of: 4 N C (+ e N C)."""
    columns = min(VOCABULARY_CHUNK, rows)
    return tokens * columns * (FLOAT32 + (width if width < FLOAT32 else 0))


def head_forward_bytes(tokens: int, hidden: int, rows: int, width: int) -> int:
    """Kept logits, the buffers of a chunk, its exponentials 4 N C, and the loss-bearing hidden states e N H."""
    exponentials = FLOAT32 * tokens * min(VOCABULARY_CHUNK, rows)
    kept = kept_logits(tokens, rows, width)
    return kept + chunk_buffers(tokens, rows, width) + exponentials + width * tokens * hidden


def head_backward_bytes(
    tokens: int, hidden: int, rows: int, width: int, build: Build, *, entropy_bonus: bool = False
) -> int:
    """Kept logits, the buffers of a chunk, and the hidden states' gradient, summed in float32: 4 N H.

    The weight's goes to megatron-core's. Of a narrower dtype come a chunk's gradient, its product and, on a
    CPU, the chunk of the weight by columns. An entropy bonus takes one more chunk, 4 N C.
    """
    columns = min(VOCABULARY_CHUNK, rows)
    gradient = FLOAT32 * tokens * hidden
    narrow = 0
    if width < FLOAT32:
        narrow = width * (tokens * columns + tokens * hidden + (columns * hidden if build is Build.local else 0))
    bonus = FLOAT32 * tokens * columns if entropy_bonus else 0
    kept = kept_logits(tokens, rows, width)
    states = width * tokens * hidden
    return kept + chunk_buffers(tokens, rows, width) + states + gradient + narrow + bonus


def teacher_head_bytes(tokens: int, hidden: int, rows: int, width: int, *, listed: int, full: bool, mixed: bool) -> int:
    """A second head on the same tokens, beside the student's: its hidden states e N H, and what its chunks take.

    A list of k ids costs both heads 12 N k twice, while it is sorted. The `full` vocabulary keeps the teacher's logits
    and three more chunks in float32. A `mixed` head is two side by side: 2 e V' H, and e N H more.
    """
    columns = min(VOCABULARY_CHUNK, rows)
    states = (1 + mixed) * width * tokens * hidden + (2 * width * rows * hidden if mixed else 0)
    lists = 2 * 2 * 12 * tokens * listed
    chunks = chunk_buffers(tokens, rows, width) + FLOAT32 * tokens * columns
    if full:
        chunks += kept_logits(tokens, rows, width) + 3 * FLOAT32 * tokens * columns
    return states + lists + chunks
