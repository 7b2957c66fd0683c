"""The engine that needs nothing beside `transformers`: every rank holds a full copy and answers its share."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from megatron_rl.models.hf_config import load_config, named_weights
from megatron_rl.parallel.collect import gather_over_world
from megatron_rl.parallel.device import device
from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.decoding import ATTENTION, decode
from megatron_rl.rollout.ending import Ending
from megatron_rl.rollout.engine import Sampling
from megatron_rl.rollout.sampling import uniforms
from megatron_rl.types import Prompt, Rollout, RolloutGroup


class HFEngine:
    """A model of `transformers` on each rank, whole.

    Prompts are padded on the left and masked, so `pad` may be any token. What the model's generation config says about
    sampling is not used: the run's config says it. Its list of end tokens is, through `stop`.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        stop: tuple[int, ...],
        pad: int,
        max_sequences: int,
    ) -> None:
        self.tokenizer, self.stop, self.pad, self.max_sequences = tokenizer, stop, pad, max_sequences
        self.model = AutoModelForCausalLM.from_config(load_config(path), dtype=dtype, attn_implementation=ATTENTION)
        self.model.to(device()).eval()
        self.dtype, self.device, self.takes = dtype, device(), True
        self.version = -1

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        parameters = self._weights()
        waiting = set(parameters)
        for name, tensor in weights:
            parameters[name].copy_(tensor)
            waiting.discard(name)
        # A tied output layer shares the embedding's memory, and is not sent a second time.
        embedding = self.model.get_input_embeddings().weight
        waiting = {name for name in waiting if parameters[name].data_ptr() != embedding.data_ptr()}
        if waiting:
            raise RuntimeError(f"the weight update left out {', '.join(sorted(waiting))}")
        self.version = version

    def _weights(self) -> dict[str, Tensor]:
        return named_weights(self.model, dict(self.model.named_parameters(remove_duplicate=False)))

    def checksums(self, names: Iterable[str]) -> dict[str, int]:
        parameters = self._weights()
        return {name: checksum(parameters[name]) for name in names}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[RolloutGroup]:
        """Ranks take prompts in turn; the groups come together again on every rank, in the order of the prompts."""
        rank, world = dist.get_rank(), dist.get_world_size()
        mine = range(rank, len(prompts), world)
        jobs = [(place, sample) for place in mine for sample in range(sampling.group_size)]
        # Prompts of like length share a batch, so that little of it is padding.
        jobs.sort(key=lambda job: (len(prompts[job[0]].token_ids), job))
        rollouts: dict[tuple[int, int], Rollout] = {}
        for start in range(0, len(jobs), self.max_sequences):
            batch = jobs[start : start + self.max_sequences]
            rollouts.update(zip(batch, self._generate_batch(prompts, batch, sampling)))
        groups = [
            (
                place,
                RolloutGroup(
                    prompt=prompts[place],
                    rollouts=tuple(rollouts[place, sample] for sample in range(sampling.group_size)),
                ),
            )
            for place in mine
        ]
        return [group for _, group in sorted(gather_over_world(groups), key=lambda item: item[0])]

    @torch.no_grad()
    def _generate_batch(
        self, prompts: Sequence[Prompt], jobs: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Rollout]:
        """Answers for the (prompt place, sample) pairs in `jobs`, all in one batch."""
        places = sorted({place for place, _ in jobs})
        keyed = [
            uniforms(sampling.seed, (*sampling.stream, sampling.first + place, sample), sampling.max_new_tokens)
            for place, sample in jobs
        ]
        ending = Ending(sampling.stop, self.decode, stop=self.stop, rows=len(jobs))
        drawn = decode(
            self.model,
            [prompts[place].token_ids for place in places],
            [places.index(place) for place, _ in jobs],
            torch.from_numpy(np.stack(keyed)).to(device()),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            pad=self.pad,
            ended=ending,
        )
        return [
            self._rollout(prompts[place].index, sample, *rows)
            for (place, sample), *rows in zip(jobs, *(values.tolist() for values in drawn), ending.ends)
        ]

    def _rollout(
        self,
        prompt_index: int,
        sample: int,
        tokens: list[int],
        log_probs: list[float],
        log_kept: list[float],
        end_of_text: int | None,
    ) -> Rollout:
        tokens = tokens[:end_of_text]
        end = next((place for place, token in enumerate(tokens) if token in self.stop), None)
        length = len(tokens) if end is None else end + 1
        return Rollout(
            prompt_index=prompt_index,
            sample_index=sample,
            token_ids=tuple(tokens[:length]),
            text=self.decode(tokens[: length if end is None else end]),
            log_probs=tuple(log_probs[:length]),
            log_kept_mass=tuple(log_kept[:length]),
            finish_reason="length" if end is None and end_of_text is None else "stop",
            policy_version=self.version,
        )

    def close(self) -> None:
        """It holds nothing else."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The response as a reward reads it."""
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text
