"""Mixtral: Llama with a mixture of experts in every layer."""

from megatron_rl.models.families import llama
from megatron_rl.models.families.mixture import Mixture

MIXTURE = Mixture(block="block_sparse_moe", gate="w1", up="w3", down="w2")

RULES = (*llama.BODY, *MIXTURE.rules())
