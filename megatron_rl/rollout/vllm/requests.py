"""What vLLM is asked for a response, and the record that its answer becomes; the same in process and by HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_rl.rollout.engine import Sampling
from megatron_rl.types import FinishReason, Rollout


def sampling_parameters(sampling: Sampling, place: int, stop: Sequence[int]) -> dict[str, Any]:
    """The arguments of `vllm.SamplingParams` for the group of a prompt.

    The group's seed is keyed as the random numbers of the `hf` engine are; vLLM gives its k-th response the k-th seed
    from there.
    """
    key = [sampling.seed, *sampling.stream, sampling.first + place]
    return {
        "n": sampling.group_size,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p if sampling.temperature else 1.0,
        "top_k": sampling.top_k if sampling.temperature else 0,
        "max_tokens": sampling.max_new_tokens,
        "seed": int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1),
        "stop_token_ids": list(stop),
        "ignore_eos": True,  # those that end a response are listed
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "detokenize": bool(sampling.stop),
        "logprobs": 0,
    }


@dataclass(frozen=True, slots=True)
class Answers:
    """Makes records of what vLLM answers. `stop` are the token ids that end a response."""

    tokenizer: PreTrainedTokenizerBase
    stop: tuple[int, ...]

    def record(
        self,
        prompt_index: int,
        sample: int,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        finish_reason: FinishReason,
        *,
        greedy: bool,
        versions: Sequence[tuple[int, int]],
    ) -> Rollout:
        """`versions`: (first token, policy version) of each run of tokens that one policy drew."""
        tokens, drawn = tuple(tokens), tuple(log_probs)
        nothing = (0.0,) * len(tokens)
        ended = tokens[-1] in self.stop
        (_, version), *later = versions
        return Rollout(
            prompt_index=prompt_index,
            sample_index=sample,
            token_ids=tokens,
            text=self._decode(tokens[:-1] if ended else tokens),
            # Greedily the largest is certain; what vLLM reports is its mass.
            log_probs=nothing if greedy else drawn,
            log_kept_mass=drawn if greedy else nothing,
            finish_reason=finish_reason,
            policy_version=version,
            later_versions=tuple(later),
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        """The response as a reward reads it."""
        text: Any = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text
