"""vLLM in the trainer's own processes: one engine per rank, or one over `tp` neighbouring ranks.

Weights go in place from the actor's iterator, tensor by tensor, and never touch a disk. What vLLM 0.32 gets wrong
silently when weights change is seen to here: an output layer that is tied is sent by its own name, keys and values
that the old weights left behind are dropped, and expert layers on a CPU are packed anew.
"""

import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_rl.metrics.progress import tick
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.parallel.device import ON_CPU
from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.engine import Sampling
from megatron_rl.types import Prompt, Rollout, RolloutGroup

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Read by vLLM when it is imported. Its engine is to live in this process, and to leave cores as they are bound.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


class VLLMEngine:
    """Answers with vLLM; see the module."""

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        stop: tuple[int, ...],
        tied: bool,
        max_sequences: int,
        max_tokens: int,
        kv_cache_gb: float,
        tp: int = 1,
    ) -> None:
        self.tokenizer, self.stop, self.dtype, self.tied, self.tp = tokenizer, stop, dtype, tied, tp
        self.version = -1
        self.taken: dict[str, int] = {}
        self.requests = 0
        with _as_it_was():
            self.llm = _start(
                model=str(path),
                load_format="dummy",  # the first update brings every tensor
                dtype=str(dtype).removeprefix("torch."),
                enforce_eager=ON_CPU,
                max_model_len=max_tokens,
                max_num_seqs=max_sequences,
                kv_cache_memory_bytes=int(kv_cache_gb * 2**30),
                tensor_parallel_size=tp,
                generation_config="vllm",  # the run's config says how to sample, not the model's
                logprobs_mode="processed_logprobs",
                seed=0,
            )

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.taken = {}
        with _as_it_was():
            self._update(self._noting(weights))
        self.version = version

    def _update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """In place; and what was computed with the old weights is forgotten."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight update")

    def _noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights as they are, in the engine's precision, and a tied output layer by its own name."""
        for name, tensor in weights:
            tick()
            tensor = tensor.to(self.dtype)
            self.taken[name] = checksum(tensor)
            yield name, tensor
            if self.tied and name == EMBEDDING:
                yield OUTPUT, tensor

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """Of what the engine took. It keeps tensors fused and packed; `rollout/log_prob_gap_*` look at the result."""
        return {name: self.taken[name] for name in names}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Engines take prompts in turn; the groups come together again on every rank, in the order of the prompts."""
        engine, engines = dist.get_rank() // self.tp, dist.get_world_size() // self.tp
        mine = range(engine, len(prompts), engines)
        answers = self._answers(prompts, mine, sampling)
        groups = [(place, RolloutGroup(prompt=prompts[place], rollouts=tuple(answers[place]))) for place in mine]
        first = dist.get_rank() % self.tp == 0  # of the ranks that share an engine
        return [group for _, group in sorted(gather_over_world(groups if first else []), key=lambda item: item[0])]

    def _answers(
        self, prompts: Sequence[Prompt], mine: Sequence[int], sampling: Sampling
    ) -> Mapping[int, Sequence[Rollout]]:
        """By place the responses to a prompt; requests are handed in together and batched by vLLM."""
        engine = self.llm.llm_engine
        jobs: dict[str, tuple[int, int]] = {}
        for place in mine:
            for sample in range(sampling.group_size):
                self.requests += 1
                jobs[str(self.requests)] = place, sample
                engine.add_request(
                    str(self.requests),
                    {"prompt_token_ids": list(prompts[place].token_ids)},
                    self._parameters(sampling, place, sample),
                )
        found: dict[tuple[int, int], Rollout] = {}
        while engine.has_unfinished_requests():
            tick()
            for output in engine.step():
                if output.finished:
                    place, sample = jobs[output.request_id]
                    found[place, sample] = self._rollout(prompts[place].index, sample, output.outputs[0], sampling)
        return {place: [found[place, sample] for sample in range(sampling.group_size)] for place in mine}

    def _parameters(self, sampling: Sampling, place: int, sample: int) -> Any:
        """Each response has a seed of its own, keyed as the random numbers of the `hf` engine are."""
        from vllm import SamplingParams

        key = [sampling.seed, *sampling.stream, sampling.first + place, sample]
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature else 1.0,
            top_k=sampling.top_k if sampling.temperature else 0,
            max_tokens=sampling.max_new_tokens,
            seed=int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1),
            stop_token_ids=list(self.stop),
            ignore_eos=True,  # those that end a response are listed
            stop=list(sampling.stop),
            include_stop_str_in_output=True,
            detokenize=bool(sampling.stop),
            logprobs=0,
        )

    def _rollout(self, prompt_index: int, sample: int, output: Any, sampling: Sampling) -> Rollout:
        tokens = tuple(output.token_ids)
        drawn = tuple(entry[token].logprob for token, entry in zip(tokens, output.logprobs, strict=True))
        nothing = (0.0,) * len(tokens)
        ended = tokens[-1] in self.stop
        return Rollout(
            prompt_index=prompt_index,
            sample_index=sample,
            token_ids=tokens,
            text=self.decode(tokens[:-1] if ended else tokens),
            # Greedily the largest is certain; what vLLM reports is its mass.
            log_probs=drawn if sampling.temperature else nothing,
            log_kept_mass=nothing if sampling.temperature else drawn,
            finish_reason=output.finish_reason,
            policy_version=self.version,
        )

    def close(self) -> None:
        """Gives back memory and vLLM's process groups; the trainer's own stay."""
        from vllm.distributed import parallel_state

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        parallel_state.destroy_model_parallel()
        if parallel_state._WORLD is not None:
            parallel_state._WORLD.destroy()
            parallel_state._WORLD = None

    def decode(self, tokens: Sequence[int]) -> str:
        """The response as a reward reads it."""
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _start(**options: Any) -> Any:
    """A `vllm.LLM` among the ranks of this world, whose process groups it uses."""
    # vLLM asks torchrun's variables for its place, which a rank need not have been started with.
    place = {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(dist.get_rank()))}
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(ENVIRONMENT | place)
    try:
        from vllm import LLM

        _pack_experts_again()
        return LLM(distributed_executor_backend="external_launcher", **options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _pack_experts_again() -> None:
    """vLLM 0.32 packs expert weights on a CPU at the first load only; an update would leave them as they came.

    UnquantizedFusedMoEMethod._setup_kernel skips process_weights_after_loading where a kernel exists already.
    """
    if not ON_CPU:
        return
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod as Method

    original = Method._setup_kernel
    if getattr(original, "packs_again", False):
        return

    def setup_kernel(self: Any, layer: Any, w13: Tensor, w2: Tensor) -> None:
        known = self.moe_kernel is not None
        original(self, layer, w13, w2)
        if known:
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    setup_kernel.packs_again = True  # type: ignore[attr-defined]
    Method._setup_kernel = setup_kernel


@contextmanager
def _as_it_was() -> Iterator[None]:
    """vLLM seeds every generator of the process and may turn gradients off; both are the trainer's."""
    python, numpy, grad = random.getstate(), np.random.get_state(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=None if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_grad_enabled(grad)
