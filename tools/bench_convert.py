"""Time and memory of conversions beside a plain copy of the same bytes.

    python tools/bench_convert.py --size 1GB --max-memory 300MB --repeats 5 --out docs/results/convert/bench.csv

A model of random numbers is imported (TP2, PP2), exported and resharded, each time between two copies of its files.
Both sides sync what they write to the disk. The memory is the process's resident set at its peak, mapped files
included, less what it was when the libraries were loaded, which the time is without. `load` is the load average over
five minutes: beside other work the processor seconds say more than the time. The limit is a copy from memory to memory.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rl.bench.measuring import copy_rate
from megatron_rl.bench.rows import Row
from megatron_rl.bench.script import main, parser_of
from megatron_rl.convert.memory import size

COLUMNS = (
    "family",
    "verb",
    "bytes",
    "max_memory",
    "rounds",
    "seconds",
    "copy_seconds",
    "speed_of_copy",
    "cpu_seconds",
    "copy_cpu_seconds",
    "peak_above_start",
    "interpreter",
    "load",
)

CODE = """
import contextlib, io, json, resource, shutil, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import megatron_rl.convert.command
from bench_convert import copy
from megatron_rl.cli import main

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

def timed(work):
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    work()
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return time.perf_counter() - began, cpu

def run(arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        if main(["convert", *arguments]):
            sys.exit(1)

source, target, verbs = Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
run(["plan", str(source)])  # loads what transformers loads late
before, found = memory("VmRSS"), {arguments[0]: [] for arguments in verbs}
for arguments in verbs * int(sys.argv[5]):
    shutil.rmtree(arguments[2], ignore_errors=True)
    copies = [timed(lambda: copy(source, target))]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    seconds, cpu = timed(lambda: run(arguments))
    peak = memory("VmHWM") - before
    copies.append(timed(lambda: copy(source, target)))
    found[arguments[0]].append({
        "seconds": seconds, "cpu": cpu, "peak": peak, "before": before,
        "copy": sum(each[0] for each in copies) / 2, "copy_cpu": sum(each[1] for each in copies) / 2,
    })
print(json.dumps(found))
"""


def make_model(directory: Path, nbytes: int, family: str) -> None:
    """A model of about `nbytes` bytes in bfloat16, in two files, never whole in memory."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig, Qwen3MoeConfig

    from megatron_rl.models.hf_config import tensor_shapes

    hidden, vocabulary = 1024, 32001
    common = {"hidden_size": hidden, "vocab_size": vocabulary, "num_attention_heads": 16, "num_key_value_heads": 8}
    if family == "llama":
        config = LlamaConfig(**common, intermediate_size=2816, num_hidden_layers=1)
        layer = 2 * (hidden * hidden * 3 + 3 * hidden * 2816)
    else:
        experts = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 384}
        config = Qwen3MoeConfig(**common, **experts, head_dim=64, intermediate_size=384, num_hidden_layers=1)
        layer = 2 * (hidden * hidden * 3 + 16 * 3 * hidden * 384)
    config.num_hidden_layers = max(1, round((nbytes - 4 * hidden * vocabulary) / layer))
    config.architectures = ["LlamaForCausalLM" if family == "llama" else "Qwen3MoeForCausalLM"]
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    names = list(tensor_shapes(directory).items())
    index: dict[str, str] = {}
    for part in range(2):
        file = f"model-{part + 1:05d}-of-00002.safetensors"
        held = {name: numbers(shape, seed) for seed, (name, shape) in enumerate(names[part::2])}
        save_file(held, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(held, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def numbers(shape: tuple[int, ...], seed: int) -> Any:
    """A tensor that differs from the others; drawing every number would take longer than converting it."""
    import torch

    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(seed)).bfloat16()
    count = math.prod(shape)
    return drawn.repeat(-(-count // len(drawn)))[:count].view(shape)


def bytes_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def copy(source: Path, target: Path) -> None:
    """A plain copy that is on the disk when it ends, and is gone again."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
            descriptor = os.open(target / path.name, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    shutil.rmtree(target)


def convert(source: Path, place: Path, verbs: list[list[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Runs conversions over and over in a process of their own, each between two copies of the source."""
    arguments = [Path(__file__).parent, source, place / "copy", json.dumps(verbs), rounds]
    done = subprocess.run([sys.executable, "-c", CODE, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measure(nbytes: int, max_memory: str, rounds: int, family: str, place: Path) -> list[dict[str, Any]]:
    """Per verb: `COLUMNS`, medians over the rounds, and the highest peak; each round's seconds."""
    source = place / "source"
    make_model(source, nbytes, family)
    layout = ["--tp", "2", "--pp", "2", *(["--ep", "2"] if family == "qwen3_moe" else [])]
    made = {verb: str(place / verb) for verb in ("import", "export", "reshard")}
    verbs = [
        ["import", str(source), made["import"], *layout, "--max-memory", max_memory],
        ["export", made["import"], made["export"], "--max-memory", max_memory],
        ["reshard", made["import"], made["reshard"], "--tp", "4", "--max-memory", max_memory],
    ]
    found = convert(source, place, verbs, rounds)
    return [
        {
            "family": family,
            "verb": verb,
            "bytes": bytes_of(source),
            "max_memory": size(max_memory),
            "rounds": rounds,
            "seconds": median(row["seconds"] for row in rows),
            "copy_seconds": median(row["copy"] for row in rows),
            "speed_of_copy": median(row["copy"] / row["seconds"] for row in rows),
            "cpu_seconds": median(row["cpu"] for row in rows),
            "copy_cpu_seconds": median(row["copy_cpu"] for row in rows),
            "peak_above_start": max(row["peak"] for row in rows),
            "interpreter": max(row["before"] for row in rows),
            "load": round(os.getloadavg()[1], 1),
            "times": tuple(row["seconds"] for row in rows),
            "ratio": statistics.median(row["seconds"] / row["copy"] for row in rows),
        }
        for verb, rows in found.items()
    ]


def median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def row_of(found: dict[str, Any], rate: float) -> Row:
    return Row(
        bench="convert",
        case=f"{found['family']} {found['verb']}, {found['bytes'] / 1e6:.0f} MB",
        times=found["times"],
        clock="wall",
        baseline="copy of the files",
        ratio=found["ratio"],
        limit="copy bandwidth",
        share=2 * found["bytes"] / rate / found["seconds"],
        figures={
            "peak MB": found["peak_above_start"] / 1e6,
            "CPU s": found["cpu_seconds"],
            "copy's CPU s": found["copy_cpu_seconds"],
        },
    )


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["date", *COLUMNS], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({"date": time.strftime("%Y-%m-%d"), **{name: row[name] for name in COLUMNS}} for row in rows)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    rate = copy_rate(clock="wall")
    for family in options.family:
        with tempfile.TemporaryDirectory(prefix="bench_convert") as place:
            found = measure(size(options.size), options.max_memory, options.repeats, family, Path(place))
        if options.out is not None:
            append(found, options.out)
        yield from (row_of(verb, rate) for verb in found)


if __name__ == "__main__":
    parser = parser_of(__doc__)
    parser.add_argument("--size", default="1GB")
    parser.add_argument("--max-memory", default="300MB")
    parser.add_argument("--family", nargs="+", choices=("llama", "qwen3_moe"), default=["llama", "qwen3_moe"])
    parser.add_argument("--out", type=Path, help="a CSV file that the figures are appended to")
    main("convert", parser, rows, quick={"size": "200MB", "family": ["llama"], "repeats": 3})
