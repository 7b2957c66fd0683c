"""What a save takes (workers/adam_state.py, checkpoint/writing.py): data-parallel shares are gathered to be written."""

from dataclasses import dataclass

from megatron_rl.models.hf_config import ModelShape
from megatron_rl.planning.activations import Build
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.parameters import FLOAT32, buckets, optimizer_tensors, trained_model


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBytes:
    """In passing, on the device, and in host memory until the files are written."""

    device: int
    host: int

    def __add__(self, other: "SaveBytes") -> "SaveBytes":
        # On the device one bucket follows the other, on the host everything comes together.
        return SaveBytes(device=max(self.device, other.device), host=self.host + other.host)


def save_bytes(
    shape: ModelShape, layout: Layout, stage: int, width: int, build: Build, *, average: bool, background: bool
) -> SaveBytes:
    """Of a model under training, with n float32 numbers of the optimizer, and one of an average, per parameter.

    On CUDA a bucket at a time is gathered on the device; the host gets (e + 4 n) P, whether in the background or not.
    On a CPU both are one: tensors that share storage are copied to be written, the others only in the background.
    """
    held = buckets(shape, layout, stage)
    numbers = optimizer_tensors(width) + average
    elements = sum(bucket.elements for bucket in held)
    gathered = trained_model(shape, layout, stage, width).gathered
    if build is Build.te:
        return SaveBytes(device=gathered, host=(width + FLOAT32 * numbers) * elements)
    shared = sum(bucket.padded for bucket in held if bucket.shared_by > 1)
    whole = FLOAT32 * numbers * shared  # every rank has it, and the first of them copies it
    written = width * elements + FLOAT32 * numbers * sum(b.elements for b in held if b.shared_by > 1)
    copies = (width + FLOAT32 * numbers) * elements if background else 0
    return SaveBytes(device=0, host=whole + written + copies)
