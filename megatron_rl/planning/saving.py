"""What a save takes (workers/adam_state.py, checkpoint/writing.py): data-parallel shares are gathered to be written."""

from dataclasses import dataclass

from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.activations import Build
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.parameters import (
    FLOAT32,
    buckets,
    frozen_model,
    layers_per_chunk,
    optimizer_tensors,
    trained_model,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBytes:
    """In passing, on the device, and in host memory until the files are written."""

    device: int
    host: int

    def __add__(self, other: "SaveBytes") -> "SaveBytes":
        # On the device one parameter follows the other, on the host everything comes together.
        return SaveBytes(device=max(self.device, other.device), host=self.host + other.host)


def saved_model(
    shape: ModelShape, layout: Layout, stage: int, width: int, build: Build, *, average: bool, background: bool
) -> SaveBytes:
    """Of a model under training, with n float32 numbers of the optimizer, and one of an average, per parameter.

    On CUDA a parameter at a time is gathered on the device; the host gets (e + 4 n) P, in the background or not. On a
    CPU both are one, and this is of the rank that writes: what ranks share is gathered, and tensors that lie in the
    storage of others, weights and the halves of gated projections, are copied; in the background all that is written.
    """
    held = buckets(shape, layout, stage)
    numbers = optimizer_tensors(width) + average
    elements = sum(bucket.elements for bucket in held)
    if build is Build.te:
        gathered = trained_model(shape, layout, stage, width).gathered
        return SaveBytes(device=gathered, host=(width + FLOAT32 * numbers) * elements)
    gathered = FLOAT32 * numbers * sum(bucket.elements for bucket in held if bucket.shared_by > 1)
    written = width * elements + FLOAT32 * numbers * gated_elements(shape, layout, stage)
    copies = (width + FLOAT32 * numbers) * elements if background else 0
    return SaveBytes(device=0, host=gathered + written + copies)


def saved_frozen(
    shape: ModelShape, layout: Layout, stage: int, width: int, build: Build, *, background: bool
) -> SaveBytes:
    """Of a model that is only read, e P on the host; on a CPU the halves of gated projections are copied."""
    weights = frozen_model(shape, layout, stage, width).weights
    if build is Build.te:
        return SaveBytes(device=0, host=weights)
    return SaveBytes(device=0, host=width * gated_elements(shape, layout, stage) + (weights if background else 0))


def gated_elements(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Of a stage's gate and up projections, which one parameter holds and two tensors are saved of."""
    layers = layout.vpp * layers_per_chunk(shape, layout, stage)
    if shape.experts is None:
        return layers * 2 * shape.ffn_hidden_size // layout.tp * shape.hidden_size
    experts = shape.experts.num_experts // layout.ep
    return layers * experts * 2 * shape.experts.ffn_hidden_size // layout.etp * shape.hidden_size
