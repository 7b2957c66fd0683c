"""Expert layers of vLLM on a CPU, packed at every load."""

from functools import wraps
from typing import Any

from torch import Tensor


def pack_experts_again() -> None:
    """vLLM 0.32 packs expert weights on a CPU at the first load only; an update would leave them as they came.

    UnquantizedFusedMoEMethod._setup_kernel skips process_weights_after_loading where a kernel exists already.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    original = Method._setup_kernel
    if getattr(original, "packs_again", False):
        return

    @wraps(original)
    def setup_kernel(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        known = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if known:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel.packs_again = True  # type: ignore[attr-defined]
    Method._setup_kernel = setup_kernel
