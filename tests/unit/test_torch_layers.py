"""The norm, the activation and the CPU's kernels against plain definitions, values and gradients."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import megatron_rl.parallel.device  # noqa: F401  (installs the CPU backend before megatron-core)
from megatron_rl.models.torch_layers import CACHED_ROWS, SwiGLU, rms_norm
from megatron_rl.parallel.cpu_kernels import add_weight_gradient, rotate_packed

# isort: split
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer import TransformerConfig

# Of the largest entry; bfloat16's results are rounded once, and products of two rounded factors on their way.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(function: Callable[..., Tensor], definition: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Results and gradients of `function` in its dtype against those of `definition` in float64."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    result, expected = function(*leaves), definition(*exact)
    assert result.dtype == tensors[0].dtype and result.shape == expected.shape
    upstream = draw(*expected.shape, seed=9).to(result.dtype)
    pairs = [(result, expected)]
    pairs += zip(torch.autograd.grad(result, leaves, upstream), torch.autograd.grad(expected, exact, upstream.double()))
    for found, wanted in pairs:
        assert (found.double() - wanted).abs().max() <= TOLERANCE[result.dtype] * wanted.abs().max()


def norm_definition(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * weight / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@DTYPES
@pytest.mark.parametrize("shape", [(7, 1, 24), (5, 3, 8)], ids=["hidden states", "heads"])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape).to(dtype), (1 + 0.3 * draw(shape[-1], seed=1)).to(dtype)
    compare(lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: norm_definition(x, w, 1e-3), x, weight)


def test_norm_of_strided_and_tiny_rows() -> None:
    """A part of a projection, as the norm of keys reads; and rows so small that eps decides."""
    x, weight = draw(6, 4, 24)[:, 1:3, 8:16], 1 + 0.3 * draw(8, seed=1)
    compare(lambda x, w: rms_norm(x * 1e-3, w, 1e-5), lambda x, w: norm_definition(x * 1e-3, w, 1e-5), x, weight)
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-5), torch.zeros(2, 8))


def test_norm_keeps_its_input_and_a_number_for_each_row() -> None:
    x, weight, kept = draw(50, 1, 24).float().requires_grad_(), torch.ones(24, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        rms_norm(x, weight, 1e-5)
    assert sorted(t.numel() for t in kept) == [24, 50, 50 * 24] and any(t.data_ptr() == x.data_ptr() for t in kept)


@DTYPES
@pytest.mark.parametrize("tokens", [3, CACHED_ROWS, 2 * CACHED_ROWS + 7])
def test_swiglu(dtype: torch.dtype, tokens: int) -> None:
    def definition(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    compare(SwiGLU(SimpleNamespace()), definition, draw(tokens, 1, 10).to(dtype))


@DTYPES
@pytest.mark.parametrize("lengths", [[5], [1, 6, 2], [4, 4]])
def test_rotation_is_megatron_cores(dtype: torch.dtype, lengths: list[int]) -> None:
    """Against the unfused path of its own, from angles that are not those of another position."""
    heads, dim = 3, 8
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    half = draw(max(lengths), 1, 1, dim // 2, seed=2)
    freqs = torch.cat([half, half], -1)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def theirs(t: Tensor) -> Tensor:
        return rope_utils._apply_rotary_pos_emb_thd(t, cu_seqlens, freqs, cp_group=group)

    def ours(t: Tensor) -> Tensor:
        return rotate_packed(t, cu_seqlens, freqs, cp_size=1, cp_rank=0)

    compare(ours, theirs, draw(sum(lengths), heads, dim).to(dtype))


def test_a_layers_rotation_is_the_cpus() -> None:
    """Through megatron-core's own door, and as its config allows."""
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=True)
    t, cu_seqlens, freqs = draw(3, 1, 8), torch.tensor([0, 3], dtype=torch.int32), draw(3, 1, 1, 4).repeat(1, 1, 1, 2)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    rotated = rope_utils.apply_rotary_pos_emb(t, freqs, config, cu_seqlens=cu_seqlens, cp_group=group)
    assert torch.equal(rotated, rotate_packed(t, cu_seqlens, freqs, cp_size=1, cp_rank=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weights_gradient_is_added(dtype: torch.dtype) -> None:
    grad_output, input, before = draw(9, 5).to(dtype), draw(9, 4, seed=1).to(dtype), draw(5, 4, seed=2).float()
    main_grad = before.clone()
    add_weight_gradient(input, grad_output, main_grad)
    wanted = before.double() + grad_output.double().t() @ input.double()
    assert (main_grad.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()
