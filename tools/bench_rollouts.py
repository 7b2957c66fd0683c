"""Seconds per token of answers: the `hf` engine beside transformers' `generate`, and vLLM beside the `hf` engine.

    python tools/bench_rollouts.py [--size 8m 50m 150m] [--dtype float32 bfloat16]

All are in this process, on one thread, and take turns with the same 16 prompts of 32 tokens, eight answers each. The
model has random weights, and one in 64 tokens of its vocabulary ends an answer, so that lengths are mixed: about
geometric with a mean of 64, cut off at 256. Each side draws its own; only tokens of answers count. The engines return
the log-probability of every token, which plain `generate` does not. Both `hf` and plain are CPU seconds; with vLLM,
where it can be imported, the clock is that on the wall.

The limit is the GEMM rate of this process in the same dtype, for 2 FLOPs per parameter (without the input embedding)
and token of a prompt or an answer.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_rl.bench.measuring import gemm_rate, timed
from megatron_rl.bench.models import SIZES, dense_parameters, make_llama
from megatron_rl.bench.rows import Clock, Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.data.tokenizer import load_tokenizer
from megatron_rl.parallel.mesh import create_mesh, destroy_mesh
from megatron_rl.rollout.engine import Engine, Sampling
from megatron_rl.rollout.hf_engine import HFEngine
from megatron_rl.rollout.vllm.engine import VLLMEngine
from megatron_rl.types import Prompt

PROMPT_TOKENS, GROUP, MEAN = 32, 8, 64
Draw = Callable[[], float]  # returns how many tokens the answers have


def by_engine(engine: Engine, ids: torch.Tensor, longest: int) -> Draw:
    prompts = [Prompt(index=i, text="", token_ids=tuple(row)) for i, row in enumerate(ids.tolist())]
    calls = 0

    def draw() -> float:
        nonlocal calls
        calls += 1
        sampling = Sampling(group_size=GROUP, max_new_tokens=longest, temperature=1.0, seed=calls, stream=(0, calls))
        groups = engine.generate(prompts, sampling)
        return sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)

    return draw


def by_generate(model: Any, ids: torch.Tensor, longest: int, stop: Sequence[int]) -> Draw:
    ends = torch.tensor(stop)

    def draw() -> float:
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=0,
            num_return_sequences=GROUP,
            max_new_tokens=longest,
            eos_token_id=list(stop),
            pad_token_id=0,
        )[:, PROMPT_TOKENS:]
        ended = torch.isin(output, ends).int().cumsum(1)
        return float((ended - torch.isin(output, ends).int() == 0).sum())

    return draw


def turns_of(sides: Mapping[str, Draw], repeats: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds per token of an answer, after a first call that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, draw in sides.items():
            drawn: list[float] = []
            seconds = timed(lambda draw=draw, drawn=drawn: drawn.append(draw()), clock=clock)  # type: ignore[misc]
            if repeat:
                found[name].append(seconds / drawn[0])
    return found


def compare(sides: Mapping[str, Draw], case: str, model: Any, options: argparse.Namespace, clock: Clock) -> Row:
    """The first side beside the second."""
    rate = gemm_rate(model.dtype, clock=clock)
    found = turns_of(sides, options.repeats, clock)
    ours, baseline = sides
    ratio = median(a / b for a, b in zip(found[ours], found[baseline], strict=True))
    work = 2 * dense_parameters(model) * (1 + PROMPT_TOKENS / MEAN)
    return Row(
        bench="rollout",
        case=f"{case} {ours}, per token",
        times=tuple(found[ours]),
        clock=clock,
        baseline=baseline,
        ratio=ratio,
        limit="GEMM peak",
        share=work / (median(found[ours]) * rate),
        figures={
            "tokens/s": 1 / median(found[ours]),
            "baseline tokens/s": 1 / median(found[baseline]),
            "times as fast": 1 / ratio,
        },
    )


def rows_of(size: str, dtype: torch.dtype, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    model = make_llama(folder, size, dtype, mean_answer=MEAN).eval()
    tokenizer, vocabulary = load_tokenizer(str(folder)), SIZES[size]["vocab_size"]
    stop = tuple(range(0, vocabulary, MEAN))
    ids = torch.randint(1, vocabulary, (options.prompts, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    common: dict[str, Any] = {"dtype": dtype, "stop": stop, "max_sequences": options.prompts * GROUP}
    hf = HFEngine(folder, tokenizer, pad=0, **common)
    hf.load_weights(iter(model.state_dict().items()), 0)
    case = f"{size} {str(dtype).removeprefix('torch.')}"
    answers = by_engine(hf, ids, options.longest)
    plain = by_generate(model, ids, options.longest, stop)
    yield compare({"hf engine": answers, "plain generate": plain}, case, model, options, "cpu")
    if importlib.util.find_spec("vllm") is None:
        print("    vLLM cannot be imported here: its engine is left out")
        return
    vllm = VLLMEngine(
        folder, tokenizer, tied=False, max_tokens=PROMPT_TOKENS + options.longest, kv_cache_gb=1.0, **common
    )
    try:
        vllm.load_weights(iter(model.state_dict().items()), 0)
        sides = {"vLLM": by_engine(vllm, ids, options.longest), "hf engine": answers}
        yield compare(sides, case, model, options, "wall")
    finally:
        vllm.close()


def measure(options: argparse.Namespace) -> Iterator[Row]:
    create_mesh()
    for size in options.size:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as folder:
                yield from rows_of(size, getattr(torch, dtype), Path(folder), options)
    destroy_mesh()


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["8m", "50m"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, metavar="TOKENS", help="an answer is cut off there")
    small = {"size": ["1m"], "dtype": ["float32"], "prompts": 4, "longest": 64, "repeats": 3}
    main("rollout", parser, measure, quick=small)
