"""Tokens per second of answers by vLLM beside transformers, and the seconds of a weight update beside its bytes.

    OMP_NUM_THREADS=1 python tools/bench_rollouts.py [--size 8m 50m 150m] [--dtype float32 bfloat16] [--repeats 3]
                                                     [--updates-only]

Needs vLLM. Both engines run in this process, one thread each, and take turns with the same 16 prompts of 32 tokens,
eight answers each. The model has random weights, and one in 64 tokens of its vocabulary ends an answer, so that
lengths are mixed: about geometric with a mean of 64, cut off at 256. Each engine draws its own; only tokens of answers
count. Both return the log-probability of every token. A server on this host takes the same weights through shared
memory; its update is timed from the trainer's side, with the pause and everything else.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_rl.rollout.engine import Engine, Sampling
from megatron_rl.rollout.hf_engine import HFEngine
from megatron_rl.rollout.vllm.engine import VLLMEngine
from megatron_rl.rollout.vllm.options import engine_options
from megatron_rl.rollout.vllm.served import ServedEngine
from megatron_rl.rollout.vllm.server import Launch
from megatron_rl.types import Prompt

SHAPES = {
    "8m": {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "vocab_size": 4096},
    "50m": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "vocab_size": 8192},
    "150m": {"hidden_size": 768, "num_hidden_layers": 18, "intermediate_size": 2048, "vocab_size": 16384},
}
PROMPTS, PROMPT_TOKENS, GROUP, LONGEST, MEAN = 16, 32, 8, 256, 64


class Timing(NamedTuple):
    """`amount` per second of wall clock and of this process's CPU."""

    wall: float
    cpu: float


def make_model(folder: Path, size: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = SHAPES[size]["hidden_size"] // 64
    config = LlamaConfig(**SHAPES[size], num_attention_heads=heads, num_key_value_heads=heads, bos_token_id=0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))
    tokenizer.save_pretrained(folder)
    return model


def timed(work: Callable[[], float]) -> Timing:
    """`work` returns what it did."""
    wall, cpu = time.perf_counter(), time.process_time()
    amount = work()
    return Timing(amount / (time.perf_counter() - wall), amount / (time.process_time() - cpu))


def answering(engine: Engine, vocabulary: int, repeat: int) -> Callable[[], float]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()
    prompts = [Prompt(index=i, text="", token_ids=tuple(row)) for i, row in enumerate(ids)]
    sampling = Sampling(group_size=GROUP, max_new_tokens=LONGEST, temperature=1.0, seed=repeat, stream=(0, repeat))

    def work() -> float:
        groups = engine.generate(prompts, sampling)
        return sum(len(rollout.token_ids) for group in groups for rollout in group.rollouts)

    return work


def updating(engine: Engine, weights: dict[str, torch.Tensor], version: int) -> float:
    start = time.perf_counter()
    engine.load_weights(iter(weights.items()), version)
    return time.perf_counter() - start


def median(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(values) for values in zip(*timings)))


def bench(size: str, dtype: torch.dtype, repeats: int, folder: Path, *, answers: bool) -> tuple[str, str]:
    """A row of each table."""
    model = make_model(folder, size)
    tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder)
    vocabulary = SHAPES[size]["vocab_size"]
    most = PROMPTS * GROUP
    common: dict[str, Any] = {"dtype": dtype, "stop": tuple(range(0, vocabulary, MEAN)), "max_sequences": most}
    longest, name = PROMPT_TOKENS + LONGEST, str(dtype).removeprefix("torch.")
    options = engine_options(folder, dtype=dtype, max_sequences=most, max_tokens=longest, kv_cache_gb=1.0, tp=1)
    launch = Launch(options=options, host="127.0.0.1", python=None, gpus=(), log=folder / "server.log")
    times = {"start_timeout_s": 600.0, "timeout_s": 120.0}
    engines: dict[str, Engine] = {
        "transformers": HFEngine(folder, tokenizer, pad=0, **common),
        "vLLM": VLLMEngine(folder, tokenizer, tied=False, max_tokens=longest, kv_cache_gb=1.0, **common),
        "server": ServedEngine(tokenizer, tied=False, servers=[launch], exchange=None, restarts=0, **times, **common),
    }
    answering_engines = [engines["transformers"], engines["vLLM"]] if answers else []
    weights = dict(model.state_dict())
    rates: dict[Engine, list[Timing]] = {engine: [] for engine in answering_engines}
    seconds: dict[str, list[float]] = {label: [] for label in engines}
    try:
        for engine in engines.values():
            updating(engine, weights, 0)
        for engine in answering_engines:
            timed(answering(engine, vocabulary, 0))  # warm
        for repeat in range(1, repeats + 1):
            for engine in answering_engines:
                rates[engine].append(timed(answering(engine, vocabulary, repeat)))
            for label, engine in engines.items():
                seconds[label].append(updating(engine, weights, repeat))
    finally:
        for engine in engines.values():
            engine.close()
    row = ""
    if answers:
        plain, fast = (median(rates[engine]) for engine in answering_engines)
        row = f"| {size.upper()} | {name} | {fast.wall:,.0f} | {plain.wall:,.0f} | {fast.wall / plain.wall:.2f} "
        row += f"| {fast.cpu / plain.cpu:.2f} |"
    mib = sum(tensor.numel() for tensor in weights.values()) * dtype.itemsize / 2**20
    cells = " | ".join(f"{statistics.median(values) * 1e3:.0f}" for values in seconds.values())
    return row, f"| {size.upper()} | {name} | {mib:.0f} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SHAPES, default=["8m", "50m"])
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates-only", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    answers = ["| model | dtype | vLLM, tokens/s | transformers, tokens/s | ratio | ratio in CPU seconds |"]
    updates = ["| model | dtype | MiB | transformers, ms | vLLM in process, ms | vLLM server, ms |"]
    answers.append("|---|---|---|---|---|---|")
    updates.append("|---|---|---|---|---|---|")
    for size in arguments.size:
        for dtype in arguments.dtype:
            with tempfile.TemporaryDirectory() as folder:
                answer, update = bench(
                    size,
                    getattr(torch, dtype),
                    arguments.repeats,
                    Path(folder),
                    answers=not arguments.updates_only,
                )
            answers.append(answer)
            updates.append(update)
            print(answer, update, sep="\n", flush=True)
    print("\n".join(["", *([] if arguments.updates_only else answers), "", *updates]))


if __name__ == "__main__":
    main()
