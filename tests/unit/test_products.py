"""Products of factors that are wider or narrower than what they are put into."""

import pytest
import torch

from megatron_rl.ops import products


def factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 40, generator=generator).to(dtype), torch.randn(40, 7, generator=generator).to(dtype)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_product_is_rounded_once(narrow: torch.dtype, wide: torch.dtype) -> None:
    left, right = factors(narrow)
    out = torch.empty(5, 7, dtype=narrow)
    assert products.mm(left.to(wide), right, out=out) is out
    assert torch.equal(out, (left.to(wide) @ right.to(wide)).to(narrow))


def test_sums_keep_their_precision() -> None:
    left, right = factors(torch.bfloat16)
    total = torch.full((5, 7), 0.1)
    products.add_mm_(total, left.float(), right.float())
    torch.testing.assert_close(total, 0.1 + left.float() @ right.float())
    products.add_mm_(total, left, right)
    torch.testing.assert_close(total, 0.1 + 2 * (left.float() @ right.float()), atol=0.1, rtol=1e-2)


def test_only_bfloat16_on_a_cpu_without_it_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=supported: answer)
        assert products.factor_dtype(torch.empty(1, dtype=torch.bfloat16)) == expected
        assert products.factor_dtype(torch.empty(1)) == torch.float32
        assert products.factor_dtype(torch.empty(1, dtype=torch.float64)) == torch.float64
        assert products.factor_dtype(torch.empty(1, dtype=torch.bfloat16, device="meta")) == torch.bfloat16
