"""Qwen3 with a mixture of experts in every layer."""

from megatron_rl.models.families import llama, qwen3
from megatron_rl.models.families.mixture import Mixture

MIXTURE = Mixture(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")

RULES = (*llama.BODY, *qwen3.QK_NORMS, *MIXTURE.rules())
