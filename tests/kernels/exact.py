"""Heads whose logits are exact in every dtype, so that kernels differ from float64 by their own rounding only.

Hidden states and weights are small multiples of 1/2 and 1/4, so logits are multiples of 1/8 up to 8, and many of them
are equal: lists have to keep to the order of ids.
"""

import torch
from torch import Tensor

H = 8
# Of statistics, which are float32 for bfloat16 too; and of gradients, relative to the largest. Through bfloat16 a
# gradient of logits keeps 8 bits, and the interpreter truncates where a GPU rounds.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-5, 2e-2)}
DTYPES = list(TOLERANCE)


def sizes(device: torch.device) -> tuple[int, int]:
    """Tokens and vocabulary: few for the interpreter."""
    return (5, 157) if device.type == "cpu" else (300, 20011)


def head(n: int, v: int, seed: int, padding: int = 3) -> tuple[Tensor, Tensor]:
    """Hidden states [n, H] and weights [v + padding, H] in float64; nan on the padding."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-2, 3, (n, H), generator=generator).double() / 2
    weight = torch.randint(-4, 5, (v, H), generator=generator).double() / 4
    return hidden, torch.cat([weight, torch.full((padding, H), torch.nan, dtype=torch.float64)])


def check(results: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within `tolerance` of the largest that is expected, or of 1."""
    assert len(results) == len(expected) > 0
    for result, value in zip(results, expected):
        bound = tolerance * max(1.0, float(value.detach().abs().max())) if value.numel() else 0.0
        torch.testing.assert_close(result.detach().cpu().double(), value.double(), rtol=0, atol=bound)
