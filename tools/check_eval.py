"""Hold an evaluation's greedy answers against those of plain transformers.

    megatron-rl eval runs/smollm2/hf problems.jsonl run.dir=runs/eval/one
    python tools/check_eval.py runs/eval/one

The problems are asked again as the evaluation's own `config.yaml` says, by `generate` of the exported model alone. What
differs is shown with the gap that the model saw there between its two best tokens: padding and batches of another shape
round differently, and where two tokens are level to rounding, either may win.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_rl.config.load import load
from megatron_rl.config.schema import EvaluationConfig
from megatron_rl.data.tokenizer import load_tokenizer, pad_id, read_generation_eos, stop_ids
from megatron_rl.rewards import resolve
from megatron_rl.trainers.data import problems
from megatron_rl.trainers.evaluate import is_correct
from megatron_rl.trainers.evaluation_files import reward_of
from megatron_rl.types import Prompt, Reward, Rollout


def answers(
    model: Any, prompts: Sequence[Prompt], *, stop: Sequence[int], pad: int, limit: int, batch: int
) -> list[list[int]]:
    """The greedy tokens after each prompt, in batches padded on the left; an end token is the last."""
    found = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        width = max(len(prompt.token_ids) for prompt in part)
        rows = [[pad] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in part]
        mask = [[0] * (width - len(prompt.token_ids)) + [1] * len(prompt.token_ids) for prompt in part]
        output = model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=limit,
            eos_token_id=list(stop),
            pad_token_id=pad,
        )
        for tokens in output[:, width:].tolist():
            end = next((place for place, token in enumerate(tokens) if token in stop), len(tokens) - 1)
            found.append(tokens[: end + 1])
    return found


def verdict(config: EvaluationConfig, prompt: Prompt, text: str, tokens: Sequence[int]) -> bool:
    """Whether the evaluation's reward finds a text right."""
    rollout = Rollout(
        prompt_index=prompt.index,
        sample_index=0,
        token_ids=tuple(tokens),
        text=text,
        log_probs=(0.0,) * len(tokens),
        log_kept_mass=(0.0,) * len(tokens),
        finish_reason="stop",
        policy_version=0,
    )
    reward = resolve(config.reward.name)(prompt, rollout, **config.reward.options)
    return is_correct(reward if isinstance(reward, Reward) else Reward(value=float(reward)))


def gap(model: Any, prompt: Prompt, tokens: Sequence[int], place: int) -> float:
    """Between the log-probabilities of the two best tokens after `place` tokens of the answer, without padding."""
    ids = torch.tensor([[*prompt.token_ids, *tokens[:place]]])
    best = model(ids, logits_to_keep=1).logits[0, -1].log_softmax(-1).topk(2).values
    return float(best[0] - best[1])


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    return next((place for place, pair in enumerate(zip(one, other)) if pair[0] != pair[1]), min(len(one), len(other)))


@torch.no_grad()
def check(directory: Path, batch: int) -> dict[str, Any]:
    """Prints each difference; the counts."""
    config = load(directory / "config.yaml").config
    assert isinstance(config, EvaluationConfig)
    if config.rollout.stop:
        raise SystemExit("this evaluation has texts that end a response (rollout.stop), which generate does not know")
    path = config.model.path
    tokenizer = load_tokenizer(path)
    lines = [json.loads(line) for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    greedy = [line for line in lines if line["draw"] == "greedy"]
    prompts = problems(config, tokenizer).all()[: len(greedy)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.model.dtype.value)).eval()
    begin = time.perf_counter()
    plain = answers(
        model,
        prompts,
        stop=stop_ids(tokenizer, read_generation_eos(path)),
        pad=pad_id(tokenizer),
        limit=config.eval.max_new_tokens or config.rollout.max_new_tokens,
        batch=batch,
    )
    seconds = time.perf_counter() - begin
    same_text = same_verdict = right = right_plain = 0
    for prompt, line, tokens in zip(prompts, greedy, plain, strict=True):
        assert prompt.text == line["prompt"]
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        verdicts = is_correct(reward_of(line)), verdict(config, prompt, text, tokens)
        right, right_plain = right + verdicts[0], right_plain + verdicts[1]
        same_text += text == line["response"]
        same_verdict += verdicts[0] == verdicts[1]
        if text != line["response"]:
            place = first_difference(tokens, tokenizer(line["response"], add_special_tokens=False)["input_ids"])
            level = gap(model, prompt, tokens, place)
            print(
                f"problem {prompt.index}: other from token {place} on; its two best differ by {level:.1e}; {verdicts}"
            )
    return {
        "problems": len(greedy),
        "same text": same_text,
        "same verdict": same_verdict,
        "right": right,
        "right by transformers": right_plain,
        "tokens": sum(map(len, plain)),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="what the evaluation wrote")
    parser.add_argument("--batch", type=int, default=16, help="problems in a call of generate; 1: without padding")
    arguments = parser.parse_args()
    print(json.dumps(check(arguments.directory, arguments.batch)))


if __name__ == "__main__":
    main()
