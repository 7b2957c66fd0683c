"""The Hugging Face engine: whatever the layout, the same responses; and a probe that finds stale weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.pool import Pool
from tests.dist.test_worker import make_worker
from tests.models import tiny_model, tiny_tokenizer

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16], [5, 6, 7], [40, 41]]


def sampling(**changes: Any) -> Any:
    from megatron_rl.rollout.engine import Sampling

    options = {"group_size": 3, "max_new_tokens": 7, "temperature": 0.8, "seed": 4, "stream": (0, 9)}
    return Sampling(**(options | changes))


def answers(directory: str, layout: dict, max_sequences: int, changes: dict, fault: str = "") -> tuple:
    """The groups, and the largest gap to the trainer's log-probabilities."""
    from megatron_rl.data.samples import from_example
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine
    from megatron_rl.rollout.sync import parity_gap, push
    from megatron_rl.types import Prompt

    worker = make_worker(directory, layout)
    engine = HFEngine(
        directory, load_tokenizer(directory), dtype=torch.float32, stop=(2, 3), pad=0, max_sequences=max_sequences
    )
    push(worker.named_hf_weights, engine, worker.version)
    if fault == "stale":
        for parameter in engine.model.parameters():
            parameter.data.mul_(1.01)
    prompts = [Prompt(index=i, text="", token_ids=tuple(ids)) for i, ids in enumerate(PROMPTS)]
    groups = engine.generate(prompts, sampling(**changes))
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    samples = [from_example(i, PROMPTS[r.prompt_index], r.token_ids) for i, r in enumerate(rollouts)]
    temperature = sampling(**changes).temperature or 1.0
    trained = worker.log_probs(samples, worker.plan(samples, 4096), temperature)
    return groups, parity_gap(rollouts, trained)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tiny_model(tmp_path_factory.mktemp("models") / "llama")
    tiny_tokenizer(directory, 99)
    return str(directory)


@pytest.mark.parametrize(
    "changes", [{}, {"top_k": 9, "top_p": 0.8}, {"temperature": 0.0}], ids=["plain", "cut", "greedy"]
)
def test_same_responses_everywhere(pool: Pool, model: str, changes: dict) -> None:
    (expected, gap), *_ = pool.run(answers, 1, model, {}, 64, changes)
    assert gap[0] < 1e-4
    assert [group.prompt.index for group in expected] == [0, 1, 2, 3, 4]
    assert {r.finish_reason for group in expected for r in group.rollouts} == {"stop", "length"} or changes
    for group in expected:
        assert [r.sample_index for r in group.rollouts] == [0, 1, 2]
        for rollout in group.rollouts:
            ended = rollout.token_ids[-1] in (2, 3)
            assert rollout.finish_reason == ("stop" if ended else "length")
            assert not set(rollout.token_ids[:-1]) & {2, 3}
            assert len(rollout.log_probs) == len(rollout.token_ids) <= 7
    if not changes:
        # The same prompt twice in a batch is two different draws.
        assert expected[0].rollouts[0].token_ids != expected[3].rollouts[0].token_ids
    for world, layout, size in ((2, {"tp": 2}, 64), (2, {"pp": 2}, 4), (4, {"tp": 2}, 2)):
        for groups, other_gap in pool.run(answers, world, model, layout, size, changes):
            assert [[r.token_ids for r in g.rollouts] for g in groups] == [
                [r.token_ids for r in g.rollouts] for g in expected
            ]
            assert other_gap[0] < 1e-4


def test_stop_texts_end_responses_whatever_shares_their_batch(pool: Pool, model: str) -> None:
    """At the first token after which the text holds one; up to there nothing changes, and no end token follows."""
    whole, _ = pool.run(answers, 1, model, {}, 64, {})[0]
    words = whole[2].rollouts[1].text.split()
    # One spans two tokens and ends inside the second, one is half a token.
    texts = (f"{words[1]} {words[2][:2]}", whole[4].rollouts[0].text.split()[3][:-1])
    (stopped, _), (alone, _) = (pool.run(answers, 1, model, {}, size, {"stop": texts})[0] for size in (64, 1))
    ends = set()
    for group, expected, single in zip(stopped, whole, alone, strict=True):
        assert [r.token_ids for r in single.rollouts] == [r.token_ids for r in group.rollouts]
        for rollout, before in zip(group.rollouts, expected.rollouts, strict=True):
            count = len(rollout.token_ids)
            by_text = any(text in rollout.text for text in texts)
            assert rollout.token_ids == before.token_ids[:count]
            assert rollout.log_probs == pytest.approx(before.log_probs[:count], abs=1e-4)
            if by_text:
                assert rollout.finish_reason == "stop" and rollout.token_ids[-1] not in (2, 3)
                assert not any(text in " ".join(rollout.text.split()[:-1]) for text in texts)
            else:
                assert (count, rollout.finish_reason) == (len(before.token_ids), before.finish_reason)
            ends.add((rollout.finish_reason, by_text, count == len(before.token_ids)))
    assert {("stop", True, False), ("length", False, True), ("stop", False, True)} <= ends


def test_greedy_is_transformers_greedy(pool: Pool, model: str) -> None:
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(model)
    groups, _ = pool.run(answers, 1, model, {}, 64, {"temperature": 0.0, "group_size": 1})[0]
    for group in groups:
        ids = torch.tensor([PROMPTS[group.prompt.index]])
        output = dense.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=7, eos_token_id=[2, 3]
        )
        assert tuple(output[0, ids.shape[1] :].tolist()) == group.rollouts[0].token_ids


def test_stale_weights_are_found(pool: Pool, model: str) -> None:
    from megatron_rl.rollout.sync import ParityError, check_parity

    _, (largest, mean) = pool.run(answers, 2, model, {"tp": 2}, 64, {}, "stale")[0]
    assert largest > 1e-2
    with pytest.raises(ParityError, match="differ from the trainer's by up to"):
        check_parity(largest, mean, 1e-3, version=0)
    check_parity(5e-4, 1e-5, 1e-3, version=0)


def partial_update(directory: str) -> str:
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine

    worker = make_worker(directory, {})
    engine = HFEngine(directory, load_tokenizer(directory), dtype=torch.float32, stop=(2,), pad=0, max_sequences=4)
    try:
        engine.load_weights((item for item in worker.named_hf_weights() if "layers.2" not in item[0]), 1)
    except RuntimeError as error:
        return str(error)
    return ""


def test_an_incomplete_update_is_refused(pool: Pool, model: str) -> None:
    assert "left out model.layers.2" in pool.run(partial_update, 1, model)[0]


def test_sampled_frequencies_follow_the_model(pool: Pool, tmp_path: Path) -> None:
    """First tokens of 600 draws against the model's own distribution."""
    directory = tiny_model(tmp_path / "m", vocab_size=16)
    tiny_tokenizer(directory, 16)
    changes = {"group_size": 600, "max_new_tokens": 1, "temperature": 1.0}
    groups, _ = pool.run(answers_one_prompt, 2, str(directory), changes)[0]
    tokens = torch.tensor([r.token_ids[0] for r in groups[0].rollouts])
    found = torch.bincount(tokens, minlength=16) / len(tokens)
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(torch.tensor([[5, 6]])).logits[0, -1].softmax(-1)
    assert (found - expected).abs().max() < 0.07


def answers_one_prompt(directory: str, changes: dict) -> tuple:
    from megatron_rl.data.tokenizer import load_tokenizer
    from megatron_rl.rollout.hf_engine import HFEngine
    from megatron_rl.rollout.sync import push
    from megatron_rl.types import Prompt

    worker = make_worker(directory, {})
    engine = HFEngine(directory, load_tokenizer(directory), dtype=torch.float32, stop=(2,), pad=0, max_sequences=256)
    push(worker.named_hf_weights, engine, worker.version)
    return engine.generate([Prompt(index=0, text="", token_ids=(5, 6))], sampling(**changes)), None
