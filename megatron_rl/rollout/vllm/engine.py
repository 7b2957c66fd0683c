"""vLLM in the trainer's own processes: one engine per rank, or one over `tp` neighbouring ranks.

Weights go in place from the actor's iterator, tensor by tensor, and never touch a disk. What vLLM 0.32 gets wrong
silently when weights change is seen to here: an output layer that is tied is sent by its own name, keys and values
that the old weights left behind are dropped, and expert layers on a CPU are packed anew.
"""

import os
import random
import secrets
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
from megatron_rl.parallel.collect import from_first_rank, gather_over_world
from megatron_rl.parallel.device import ON_CPU, device
from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.vllm.experts import pack_experts_again
from megatron_rl.rollout.vllm.options import engine_options
from megatron_rl.rollout.vllm.requests import Answers, sampling_parameters
from megatron_rl.rollout.vllm.weights import with_output_layer
from megatron_rl.types import Prompt, Rollout, RolloutGroup

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
        sleep: bool = False,
    ) -> None:
        self.answers, self.dtype, self.tied, self.tp = Answers(tokenizer, stop), dtype, tied, tp
        self.device, self.takes, self.version = device(), True, -1
        self.taken: dict[str, int] = {}
        self.requests = 0
        self.sleeps = sleep and not ON_CPU  # vLLM does not on a CPU
        self.asleep = False
        with _as_it_was():
            options = engine_options(
                path,
                dtype=dtype,
                max_sequences=max_sequences,
                max_tokens=max_tokens,
                kv_cache_gb=kv_cache_gb,
                tp=tp,
            )
            self.llm = _start(enable_sleep_mode=self.sleeps, **options)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.taken = {}
        self._wake()
        with _as_it_was():
            self._update(with_output_layer(self._noting(weights), self.tied))
        self.version = version

    def _update(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """In place; and what was computed with the old weights is forgotten."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight update")

    def _noting(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights in the engine's precision, with their checksums."""
        for name, tensor in weights:
            tick()
            tensor = tensor.to(self.dtype)
            self.taken[name] = checksum(tensor)
            yield name, tensor

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        """Of what the engine took. It keeps tensors fused and packed; `rollout/log_prob_gap_*` look at the result."""
        return {name: self.taken[name] for name in names}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Engines take prompts in turn; the groups come together again on every rank, in the order of the prompts."""
        engine, engines = dist.get_rank() // self.tp, dist.get_world_size() // self.tp
        mine = range(engine, len(prompts), engines)
        self._wake()
        answers = self._answers(prompts, mine, sampling)
        self._sleep()
        groups = [(place, RolloutGroup(prompt=prompts[place], rollouts=tuple(answers[place]))) for place in mine]
        first = dist.get_rank() % self.tp == 0  # of the ranks that share an engine
        return [group for _, group in sorted(gather_over_world(groups if first else []), key=lambda item: item[0])]

    def _sleep(self) -> None:
        """Weights go to the host's memory; keys and values are dropped."""
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = True

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _answers(
        self, prompts: Sequence[Prompt], mine: Sequence[int], sampling: Sampling
    ) -> Mapping[int, Sequence[Rollout]]:
        """By place the responses to a prompt; requests are handed in together and batched by vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        places: dict[str, int] = {}
        for place in mine:
            self.requests += 1
            places[str(self.requests)] = place
            parameters = sampling_parameters(sampling, place, self.answers.stop)
            engine.add_request(
                str(self.requests),
                {"prompt_token_ids": list(prompts[place].token_ids)},
                SamplingParams(**parameters, output_kind=RequestOutputKind.FINAL_ONLY),
            )
        found: dict[int, Sequence[Rollout]] = {}
        while engine.has_unfinished_requests():
            tick()
            for output in engine.step():
                if output.finished:
                    place = places[output.request_id]
                    responses = sorted(output.outputs, key=lambda response: int(response.index))
                    found[place] = [self._record(prompts[place].index, response, sampling) for response in responses]
        return found

    def _record(self, prompt_index: int, response: Any, sampling: Sampling) -> Rollout:
        return self.answers.record(
            prompt_index,
            response.index,
            response.token_ids,
            [entry[token].logprob for token, entry in zip(response.token_ids, response.logprobs, strict=True)],
            response.finish_reason,
            greedy=not sampling.temperature,
            versions=[(0, self.version)],
        )

    def close(self) -> None:
        """Gives back memory and vLLM's process groups. Those of the trainer stay, which vLLM would end as well."""
        from vllm.distributed import parallel_state

        def end_own_world() -> None:
            if parallel_state._WORLD is not None:
                parallel_state._WORLD.destroy()
                parallel_state._WORLD = None

        end_all = parallel_state.destroy_distributed_environment
        parallel_state.destroy_distributed_environment = end_own_world
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            parallel_state.destroy_distributed_environment = end_all
        del self.llm


def _start(**options: Any) -> Any:
    """A `vllm.LLM` among the ranks of this world, whose process groups it uses."""
    # vLLM asks torchrun's variables for its place, which a rank need not have been started with.
    place = {"RANK": str(dist.get_rank()), "LOCAL_RANK": os.environ.get("LOCAL_RANK", str(dist.get_rank()))}
    name = from_first_rank(f"megatron_rl-{secrets.token_hex(4)}")
    with _environment(ENVIRONMENT, place), _shared_memory(name):
        from vllm import LLM

        pack_experts_again()
        return LLM(distributed_executor_backend="external_launcher", **options)


@contextmanager
def _shared_memory(name: str) -> Iterator[None]:
    """Of an engine over several ranks of a CPU: vLLM 0.32 would call it the same in every run on this host.

    Once all ranks have it, the name is removed: so it goes with the last of them, however that ends.
    """
    if not ON_CPU:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Segment

    original = Segment.make_group_name
    Segment.make_group_name = staticmethod(lambda communicator: f"{name}{original(communicator).lstrip('/')}")
    try:
        yield
    finally:
        Segment.make_group_name = staticmethod(original)
    dist.barrier()
    for segment in Path("/dev/shm").glob(f"{name}*"):
        segment.unlink(missing_ok=True)


@contextmanager
def _environment(kept: Mapping[str, str], during: Mapping[str, str]) -> Iterator[None]:
    """Sets variables; those of `during` are as before afterwards."""
    before = {name: os.environ.get(name) for name in during}
    os.environ.update({**kept, **during})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _as_it_was() -> Iterator[None]:
    """vLLM seeds every generator of the process and may turn gradients off; both are the trainer's."""
    python, numpy, grad = random.getstate(), np.random.get_state(), torch.is_grad_enabled()
    with torch.random.fork_rng(devices=None if torch.cuda.is_available() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_grad_enabled(grad)
