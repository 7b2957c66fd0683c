"""Decoding against the model's own forward pass on whole answers."""

import pytest
import torch
from torch import Tensor

PROMPTS = [[5, 6, 7], [9], [3, 4, 8, 2, 6]]
PLACES = [0, 0, 1, 2, 2, 2, 2, 0, 1, 1]
LENGTHS = torch.tensor([3, 70, 9, 1, 12, 70, 33, 2, 5, 66])  # one cache is filled, and makes room
VOCABULARY = 32


def model(kind: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    from megatron_rl.rollout.decoding import ATTENTION

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    config = Qwen3Config(**shape, head_dim=16) if kind == "qwen3" else LlamaConfig(**shape)
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_answers_of_all_lengths_have_the_models_log_probabilities(kind: str) -> None:
    from megatron_rl.rollout.decoding import decode

    asked: list[int] = []

    def ended(rows: list[int], tokens: Tensor) -> Tensor:
        asked.append(len(rows))
        return LENGTHS[rows] <= len(asked)

    uniform = torch.rand(len(PLACES), 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lm = model(kind)
    drawn = decode(lm, PROMPTS, PLACES, uniform, temperature=0.7, top_k=0, top_p=1.0, pad=0, ended=ended)
    for row, (place, length) in enumerate(zip(PLACES, LENGTHS.tolist())):
        answer = drawn.tokens[row, :length]
        ids = torch.cat([torch.tensor(PROMPTS[place]), answer])
        expected = (lm(ids[None]).logits[0, -length - 1 : -1] / 0.7).log_softmax(-1)
        torch.testing.assert_close(
            drawn.log_probs[row, :length].double(), expected.gather(1, answer[:, None])[:, 0], atol=1e-6, rtol=0
        )
        # The token is where the distribution function passes the uniform number.
        cumulative = expected.exp().cumsum(1)
        below = torch.cat([torch.zeros(length, 1), cumulative[:, :-1]], 1).gather(1, answer[:, None])[:, 0]
        assert (below <= uniform[row, :length] + 1e-6).all()
        assert (uniform[row, :length] <= cumulative.gather(1, answer[:, None])[:, 0] + 1e-6).all()
    assert drawn.tokens.shape == (len(PLACES), 70) and len(asked) == 70
    assert asked == sorted(asked, reverse=True) and asked[0] == 10 and asked[12] <= 5 and asked[-1] == 2


def test_the_planner_counts_the_room() -> None:
    from megatron_rl.planning import rollouts
    from megatron_rl.rollout import decoding

    assert rollouts.ROOM == decoding.ROOM
