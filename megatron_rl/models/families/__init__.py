"""One file per model family: which Hugging Face tensor is which Megatron parameter. Tables, no logic."""

from dataclasses import dataclass

from megatron_rl.models.families import llama, mixtral, qwen2, qwen3, qwen3_moe
from megatron_rl.models.families.mixture import Mixture
from megatron_rl.models.hf_map import Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family's weight map and what its layers have beside Llama's."""

    name: str  # `model_type` in the config
    rules: tuple[Rule, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    mixture: Mixture | None = None  # of experts, in place of the MLP


FAMILIES = {
    family.name: family
    for family in (
        Family(name="llama", rules=llama.RULES),
        Family(name="qwen2", rules=qwen2.RULES, qkv_bias=True),
        Family(name="qwen3", rules=qwen3.RULES, qk_norm=True),
        Family(name="qwen3_moe", rules=qwen3_moe.RULES, qk_norm=True, mixture=qwen3_moe.MIXTURE),
        Family(name="mixtral", rules=mixtral.RULES, mixture=mixtral.MIXTURE),
    )
}
