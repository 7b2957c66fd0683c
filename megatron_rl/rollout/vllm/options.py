"""How an engine of vLLM is made; the same in process and in a server."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_rl.parallel.device import ON_CPU

CPU_BATCH_TOKENS = 4096  # that a CPU takes in one pass, at least


def engine_options(
    path: str | Path, *, dtype: torch.dtype, max_sequences: int, max_tokens: int, kv_cache_gb: float, tp: int
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`. `max_tokens` of a prompt and its answer; GiB of keys and values in each process."""
    return {
        "model": str(path),
        "load_format": "dummy",  # the first update brings every tensor
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_tokens,
        "max_num_seqs": max_sequences,
        "kv_cache_memory_bytes": int(kv_cache_gb * 2**30),
        "tensor_parallel_size": tp,
        "generation_config": "vllm",  # the run's config says how to sample, not the model's
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
        **(_on_a_cpu(max_tokens) if ON_CPU else {}),
    }


def _on_a_cpu(max_tokens: int) -> dict[str, Any]:
    """Prompts are read whole: where vLLM 0.32 reads one in parts, it asks the generator of a request with a seed to go
    back, which those of a CPU cannot (GPUModelRunner._bookkeeping_sync)."""
    return {
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_tokens, CPU_BATCH_TOKENS),
    }


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """The same as flags of vLLM's command line."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
