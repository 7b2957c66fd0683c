"""Steps of a real GRPO run beside a plain loop in transformers that does the same: seconds by the clock on the wall.

    python tools/bench_step.py [--size 1m 8m]

Here: `megatron-rl train` with `parallel.dp=2` and the `hf` engine, two processes of one thread; the phases are those of
its `metrics.jsonl`. There: one process of two threads, `generate`, the rewards' place taken by random numbers, and a
padded policy-gradient update with AdamW; half of its steps before the run and half after it. Both answer 8 prompts of
16 tokens 8 times, in float32, with a model of random weights in which one in 32 tokens ends an answer, 128 tokens at
most, and leave out their first step.

Ratios are of seconds per token, prompts included, for each side draws its own answers. The limit is the rate of a
1024^3 product on two threads, for 2 FLOPs per parameter (without the input embedding) and token in generation, and 6 in
the update. A step here also sends the weights to the engine and checks them, rewards and audits; `step` has their
seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import yaml

from megatron_rl.bench.measuring import gemm_rate
from megatron_rl.bench.models import SIZES, dense_parameters, make_llama
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of

PROMPTS, PROMPT_TOKENS, GROUP, LONGEST, MEAN = 8, 16, 8, 128, 32
RANKS, LEARNING_RATE = 2, 1e-5
UPDATE_SEQUENCES = 32  # in one padded batch of the plain loop
SHOWN = {"gen": 2, "update_actor": 6, "step": 8}  # phases, and FLOPs per parameter and token


class Step(NamedTuple):
    tokens: float
    seconds: dict[str, float]


def make_run(folder: Path, size: str, steps: int) -> Path:
    """A config, and the model and data that it names."""
    model = make_llama(folder / "model", size, mean_answer=MEAN)
    ids = torch.randint(1, model.config.vocab_size, (64, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    lines = [{"prompt": " ".join(f"w{i}" for i in row), "answer": "w1"} for row in ids.tolist()]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "trainer": "grpo",
        "model": {"path": str(folder / "model")},
        "optim": {"lr": LEARNING_RATE},
        "data": {"train": str(folder / "train.jsonl"), "max_prompt_tokens": PROMPT_TOKENS},
        "train": {"steps": steps, "batch_size": PROMPTS},
        "rollout": {"group_size": GROUP, "max_new_tokens": LONGEST, "max_sequences": PROMPTS * GROUP},
        "reward": {"name": "exact", "workers": 1},
        "parallel": {"dp": RANKS},
        "run": {"dir": str(folder / "run")},
    }
    path = folder / "grpo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def trained(config: Path) -> list[Step]:
    """The steps of a run in processes of its own, without the first."""
    done = subprocess.run([sys.executable, "-m", "megatron_rl", "train", str(config)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the run ended with exit code {done.returncode}:\n{done.stderr}")
    lines = [json.loads(line) for line in (config.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "timing_s/step" in line][1:]
    prefix = "timing_s/"
    return [
        Step(
            line["perf/total_num_tokens"],
            {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)},
        )
        for line in steps
    ]


class Plain:
    """The same step as one writes it with transformers."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        self.ends = torch.tensor(model.generation_config.eos_token_id)

    def steps(self, count: int) -> list[Step]:
        """Without the first."""
        return [self.step(seed) for seed in range(count + 1)][1:]

    def step(self, seed: int) -> Step:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, self.model.config.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator)
        start = time.perf_counter()
        with torch.no_grad():
            tokens = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=GROUP,
                max_new_tokens=LONGEST,
            )
        middle = time.perf_counter()
        ended = torch.isin(tokens[:, PROMPT_TOKENS:], self.ends).int()
        answers = ended.cumsum(1) - ended == 0
        advantages = torch.randn(len(tokens), generator=generator)
        self.update(tokens, answers, advantages)
        end = time.perf_counter()
        count = float(answers.sum()) + tokens.shape[0] * PROMPT_TOKENS
        return Step(count, {"gen": middle - start, "update_actor": end - middle, "step": end - start})

    def update(self, tokens: torch.Tensor, answers: torch.Tensor, advantages: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        mask = torch.cat([torch.ones(len(tokens), PROMPT_TOKENS, dtype=torch.bool), answers], 1).long()
        for rows in torch.arange(len(tokens)).split(UPDATE_SEQUENCES):
            logits = self.model(input_ids=tokens[rows], attention_mask=mask[rows], use_cache=False).logits
            logp = logits[:, PROMPT_TOKENS - 1 : -1].float().log_softmax(-1)
            chosen = logp.gather(2, tokens[rows, PROMPT_TOKENS:, None])[..., 0]
            (-(chosen * advantages[rows, None])[answers[rows]].sum() / answers.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def rows_of(size: str, here: Sequence[Step], there: Sequence[Step], parameters: int, rate: float) -> Iterator[Row]:
    def per_token(steps: Sequence[Step], phase: str) -> float:
        return median(step.seconds[phase] / step.tokens for step in steps)

    for phase, flops in SHOWN.items():
        seconds = [step.seconds[phase] for step in here]
        figures = {"tokens": median(step.tokens for step in here), "tokens/s": 1 / per_token(here, phase)}
        figures["plain tokens/s"] = 1 / per_token(there, phase)
        if phase == "step":
            common = set.intersection(*(set(step.seconds) for step in here))
            others = sorted(name for name in common - set(SHOWN) if "/" not in name)
            figures |= {f"{name} s": median(step.seconds[name] for step in here) for name in others}
        yield Row(
            bench="rl-step",
            case=f"{size} float32 dp{RANKS} {phase}",
            times=tuple(seconds),
            clock="wall",
            threads=RANKS,
            baseline="plain transformers loop",
            ratio=per_token(here, phase) / per_token(there, phase),
            limit="GEMM peak",
            share=flops * parameters / (per_token(here, phase) * rate),
            figures=figures,
        )


def measure(options: argparse.Namespace) -> Iterator[Row]:
    torch.set_num_threads(RANKS)
    rate = gemm_rate(torch.float32, clock="wall")
    for size in options.size:
        with tempfile.TemporaryDirectory() as folder:
            model = make_llama(Path(folder, "plain"), size, mean_answer=MEAN)
            plain = Plain(model)
            there = plain.steps((options.repeats + 1) // 2)
            here = trained(make_run(Path(folder), size, options.repeats + 1))
            there += plain.steps(options.repeats // 2)
            yield from rows_of(size, here, there, dense_parameters(model), rate)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["1m", "8m"])
    main("rl-step", parser, measure, quick={"size": ["1m"], "repeats": 3})
