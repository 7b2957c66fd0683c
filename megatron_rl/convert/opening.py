"""What a path is: a Hugging Face directory, a checkpoint, a run; and its tensors under the names that compare."""

from pathlib import Path

from megatron_rl.checkpoint.hf import INDEX
from megatron_rl.checkpoint.store import STATE, find_checkpoint, read_state
from megatron_rl.checkpoint.torch_dist import SavedTensors, Spec
from megatron_rl.convert.exporting import read_saved
from megatron_rl.convert.tensors import HfTensors, Tensors
from megatron_rl.convert.views import AsHf, Resized

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def is_hf(path: Path) -> bool:
    """Whether it is a Hugging Face directory; ValueError where it is nothing that can be converted."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory")
    if (path / STATE).is_file() or (path / "checkpoints").is_dir():
        return False
    if (path / INDEX).is_file() or any(path.glob("*.safetensors")) or (path / "config.json").is_file():
        return True
    raise ValueError(f"{path} is no Hugging Face directory, checkpoint (with {STATE}) or run (with checkpoints)")


def as_hf(path: Path, role: str | None, like: Path | None) -> Tensors:
    """Its tensors under Hugging Face's names."""
    if is_hf(path):
        return HfTensors(path)
    saved = read_saved(path, role, like)
    return AsHf(saved.tensors, saved.lines, saved.role)


def to_compare(one: Path, other: Path, role: str | None, like: Path | None) -> tuple[Tensors, Tensors]:
    """Two checkpoints with all that they hold, unless a role is named; otherwise under Hugging Face's names."""
    if role is None and not is_hf(one) and not is_hf(other):
        return _unpadded(one), _unpadded(other)
    return as_hf(one, role, like), as_hf(other, role, like)


def _unpadded(path: Path) -> Tensors:
    """All tensors of a checkpoint, those of the vocabulary without the rows that its layout padded them with."""
    path = find_checkpoint(path, "the checkpoint")
    saved, models = SavedTensors(path), read_state(path)["models"]
    specs = {}
    for key, spec in saved.specs.items():
        most = models[key.split(".")[0]]["vocab_size"] if key.endswith(VOCABULARY) else spec.shape[0]
        specs[key] = Spec(spec.dtype, (min(spec.shape[0], most), *spec.shape[1:]))
    return Resized(saved, specs)
