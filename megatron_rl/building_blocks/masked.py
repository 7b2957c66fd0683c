"""Sums and means over the elements that a mask keeps."""

from torch import Tensor


def masked_mean(tensor: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """sum(tensor mask) / sum(mask) along `dim`, over everything if it is None.

    NaN where the mask keeps nothing, for that is 0 / 0. The trainers' weights are 0 there instead: a sequence without
    loss-bearing tokens is not counted (algorithms/reduction.py).
    """
    kept = _kept(tensor, mask)
    return kept.sum() / mask.sum() if dim is None else kept.sum(dim) / mask.sum(dim)


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int | None = None, normalize_constant: float = 1.0) -> Tensor:
    """sum(tensor mask) / normalize_constant along `dim`, over everything if it is None."""
    if normalize_constant == 0:
        raise ValueError("normalize_constant is 0, and sums are divided by it: give the longest response, or 1")
    kept = _kept(tensor, mask)
    return (kept.sum() if dim is None else kept.sum(dim)) / normalize_constant


def _kept(tensor: Tensor, mask: Tensor) -> Tensor:
    """tensor mask, and 0 where the mask is 0 even if the tensor is NaN or infinite there."""
    if tensor.shape != mask.shape:
        raise ValueError(
            f"the mask has shape {list(mask.shape)} and the tensor {list(tensor.shape)}: expand one to the other"
        )
    return tensor.where(mask != 0, 0) * mask
