"""The planner's prediction against what is really held, on a CPU: three models and more, in several layouts.

    OMP_NUM_THREADS=1 python tools/check_memory.py [--out docs/results/memory] [--only NAME ...]

Each case is a config. Its ranks are started, its trainer is built, an engine answers, an update is made of full
micro-batches, a checkpoint is saved. What is held are the bytes of all storages that tensors of the process have,
looked at after every operator (`LiveBytes`); scratch memory inside of a kernel is not seen. A prediction is made for
the layers that run here (Build.local), with bfloat16 multiplied as it is: a CPU without instructions for it widens
factors, and holds more. `memory.csv` has every rank; both files are made anew.
"""

import argparse
import csv
import datetime
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

PROMPT, ANSWER, VOCABULARY = 8, 120, 2048
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "vocab_size": VOCABULARY,
}
EXPERTS = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 320},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 320},
}


class Measured(NamedTuple):
    """Bytes of one rank: of a part, or of everything in a moment."""

    case: str
    stage: int
    rank: int
    what: str
    predicted: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


class Setting(NamedTuple):
    """A case: its trainer, model family, and what is set beside the defaults of `options`."""

    world: int
    trainer: str
    family: str
    tied: bool
    options: dict[str, Any]


BF16 = {"model.dtype": "bfloat16"}
TP2 = {"parallel.tp": 2, "parallel.sequence_parallel": True}
CASES = {
    "llama_fp32_grpo": Setting(1, "grpo", "llama", False, {"kl.where": "loss", "average.enabled": True}),
    "qwen2_bf16_tp2_sp_grpo": Setting(2, "grpo", "qwen2", True, {**BF16, **TP2, "kl.where": "loss"}),
    "qwen3_bf16_pp2_sdpo": Setting(2, "sdpo", "qwen3", True, {**BF16, "parallel.pp": 2}),
    "llama_bf16_dp2_ppo": Setting(2, "ppo", "llama", False, {**BF16, "checkpoint.background": True}),
    "qwen3_fp32_tp2_pp2_recompute": Setting(
        4, "grpo", "qwen3", False, {**TP2, "parallel.pp": 2, "parallel.recompute": True}
    ),
    "llama_fp32_sdpo_mixed": Setting(
        1, "sdpo", "llama", False, {"distill.support": "full", "teacher.mode": "trust_region", "teacher.rate": 0.5}
    ),
    "qwen2_fp32_pp2_vpp2": Setting(2, "grpo", "qwen2", False, {"parallel.pp": 2, "parallel.vpp": 2}),
    "llama_fp32_tp2_dp2": Setting(4, "grpo", "llama", True, {"parallel.tp": 2, "average.enabled": True}),
    "llama_bf16_recompute": Setting(1, "grpo", "llama", True, {**BF16, "parallel.recompute": True}),
    "qwen3_moe_bf16_tp2_ep2": Setting(2, "grpo", "qwen3_moe", False, {**BF16, **TP2, "parallel.ep": 2}),
    "mixtral_bf16_tp2_etp2": Setting(2, "grpo", "mixtral", False, {**BF16, **TP2, "parallel.etp": 2}),
    "qwen3_moe_fp32_ep2_recompute": Setting(
        2, "grpo", "qwen3_moe", False, {"parallel.ep": 2, "parallel.recompute": True}
    ),
}


def _has_storage(value: object) -> bool:
    """A sparse tensor has none of its own; its indices and values were seen when they were made."""
    return isinstance(value, Tensor) and not value.is_sparse


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that were made in it and are not freed; `peak` is the most since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[int, int]] = {}  # weak reference, bytes
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in filter(_has_storage, tree_iter(result)):
            if value.device.type == "cpu":
                storage = value.untyped_storage()
                if storage._cdata not in self.storages and storage.nbytes():
                    self.storages[storage._cdata] = storage._weak_ref(), storage.nbytes()
        self.now()
        return result

    def now(self) -> int:
        """Bytes that are live."""
        for key, (reference, _) in list(self.storages.items()):
            if torch.UntypedStorage._expired(reference):
                torch.UntypedStorage._free_weak_ref(reference)
                del self.storages[key]
        live = sum(size for _, size in self.storages.values())
        self.peak = max(self.peak, live)
        return live

    def reset(self) -> None:
        self.peak = 0
        self.now()


def write_model(directory: Path, setting: Setting) -> None:
    """A config and a tokenizer of numbers, whose last word ends a response; weights are drawn by the run."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        MixtralConfig,
        PreTrainedTokenizerFast,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    families = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
        "mixtral": MixtralConfig,
    }
    sizes = SIZES | EXPERTS.get(setting.family, {})
    if "qwen3" in setting.family:
        sizes["head_dim"] = 32
    families[setting.family](tie_word_embeddings=setting.tied, eos_token_id=VOCABULARY - 1, **sizes).save_pretrained(
        directory
    )
    words = {f"w{number}": number for number in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="</s>").save_pretrained(directory)


def write_case(directory: Path, name: str, scale: int) -> Path:
    """The case's config file, with its model and prompts beside it; `scale` multiplies the tokens of a micro-batch."""
    setting = CASES[name]
    write_model(directory / "model", setting)
    prompt = " ".join(f"w{3 + place}" for place in range(PROMPT))
    lines = [json.dumps({"prompt": prompt, "answer": "w1"})] * 64
    (directory / "train.jsonl").write_text("\n".join(lines) + "\n")
    options: dict[str, Any] = {
        "trainer": setting.trainer,
        "model.path": str(directory / "model"),
        "model.weights": "random",
        "data.train": str(directory / "train.jsonl"),
        "data.max_prompt_tokens": PROMPT,
        "train.steps": 1,
        "train.batch_size": 4 * scale,
        "train.max_tokens_per_micro_batch": 4 * scale * (PROMPT + ANSWER),
        "rollout.engine": "hf",
        "rollout.group_size": 4,
        "rollout.max_new_tokens": ANSWER,
        "rollout.max_sequences": 8,
        "run.dir": str(directory / "run"),
        **setting.options,
    }
    tree: dict[str, Any] = {}
    for key, value in options.items():
        *sections, last = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    path = directory / "config.yaml"
    path.write_text(json.dumps(tree))  # which is YAML
    return path


def measure(name: str, path: str) -> list[Measured]:
    """This rank's part of a case. Collective."""
    from megatron_rl.config.load import load_config
    from megatron_rl.models.hf_config import load_shape
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.planning.activations import Build
    from megatron_rl.planning.layout import Layout
    from megatron_rl.planning.memory import Case, footprint
    from megatron_rl.planning.schedule import longest_step, schedule
    from megatron_rl.trainers.average import AveragedModel
    from megatron_rl.trainers.resume import checkpoint_store
    from megatron_rl.trainers.run import build

    config = load_config(path)
    with LiveBytes() as live, patch.object(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", return_value=True):
        mesh = create_mesh(**vars(config.parallel), seed=1)
        trainer = build(config, mesh)
        trainer.parts.push(trainer.actor)
        update(trainer, config)  # Adam's numbers are made by the first step
        averaged = None
        if trainer.average is not None and config.trainer != "sdpo":
            averaged = AveragedModel(config, mesh, trainer.average).now()
        held = live.now()
        peaks = {}
        with moment(live, peaks, "rollouts"):
            rollouts(trainer, config)
        with moment(live, peaks, "update"):
            update(trainer, config)
        with moment(live, peaks, "a save"):
            checkpoint_store(config).save(1, trainer.roles(), {})
            checkpoint_store(config).complete()
    trainer.parts.close()
    shape = load_shape(config.model.path)
    case = Case(
        config=config,
        actor=shape,
        critic=shape.as_scalar() if trainer.critic is not None else None,
        layout=Layout.of(config.parallel, mesh.world_size),
        build=Build.local,
    )
    micro_batches = schedule(config, case.layout, longest_step(config)).micro_batches
    found = footprint(case, mesh.pp_rank, micro_batches)
    predicted = {
        "rollouts": found.at("rollouts"),
        "update": max(found.at(name) for name in found.moments if "update" in name),
        "a save": found.at("a save"),
    }
    place = name, mesh.pp_rank, mesh.rank
    rows = [Measured(*place, part, found.held[part], size) for part, size in parts(trainer, averaged).items()]
    rows.append(Measured(*place, "held between steps", found.between_steps, held))
    peak = peaks["update"] - held
    rows.append(Measured(*place, "activations", predicted["update"] - found.between_steps, peak))
    return rows + [Measured(*place, what, predicted[what], peak) for what, peak in peaks.items()]


@contextmanager
def moment(live: LiveBytes, peaks: dict[str, int], name: str) -> Iterator[None]:
    live.reset()
    yield
    peaks[name] = live.peak


def parts(trainer: Any, averaged: Any) -> dict[str, int]:
    """The bytes of what a trainer's models hold, by the planner's names."""
    from megatron_rl.workers import adam_state

    found = {}
    for prefix, worker in (("", trainer.actor), ("critic: ", trainer.critic)):
        if worker is None:
            continue
        parameters = [parameter for model in worker.models for parameter in model.parameters()]
        own = {tensor.untyped_storage()._cdata for tensor in parameters}
        numbers = [tensor for shard in adam_state.shards(worker.optimizer) for tensor in shard.tensors.values()]
        found[f"{prefix}weights"] = storage_bytes(parameters)
        found[f"{prefix}gradients"] = storage_bytes([buffer.grad_data for buffer in worker._buffers()])
        found[f"{prefix}optimizer"] = sum(t.nbytes for t in numbers if t.untyped_storage()._cdata not in own)
    teacher = getattr(trainer, "teacher", None)
    reference = getattr(getattr(trainer, "policies", None), "reference", None)
    for name, model in (
        ("teacher", teacher and teacher.model),
        ("reference", reference),
        ("model of the average", averaged),
    ):
        if model is not None:
            found[name] = storage_bytes([parameter for part in model.models for parameter in part.parameters()])
    if trainer.average is not None:
        found["average of the weights"] = storage_bytes(list(trainer.average.shards.values()))
    found["engine: weights"] = storage_bytes(list(trainer.parts.engine.model.parameters()))
    return found


def storage_bytes(tensors: list[Tensor]) -> int:
    """Each storage once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def rollouts(trainer: Any, config: Any) -> None:
    """Answers to prompts that are all at their longest."""
    from megatron_rl.trainers.rollouts import sampling
    from megatron_rl.types import Prompt

    ids = tuple(range(3, 3 + PROMPT))
    prompts = [Prompt(index=i, row={}, text="", token_ids=ids) for i in range(config.train.batch_size)]
    trainer.parts.generate(prompts, sampling(config, 1, 0))


def update(trainer: Any, config: Any) -> None:
    """One of the policy, and one of the critic, on samples that are all at their longest."""
    from megatron_rl.data.samples import from_example, weighed

    count = config.train.batch_size * config.rollout.group_size
    examples = [from_example(i, list(range(3, 3 + PROMPT)), [5] * ANSWER) for i in range(count)]
    fields = ("advantages", "old_log_probs", "ref_log_probs", "returns", "old_values", "distill_weights")
    samples = weighed(examples, "token-mean")
    for name in fields:
        samples = [sample.with_loss_field(name, torch.full((ANSWER,), -1.0 / ANSWER)) for sample in samples]
    if config.trainer == "sdpo":
        distil(trainer, config, samples)
    else:
        trainer.update._once(samples)
    if trainer.critic is not None:
        trainer.value_update._once(samples)


def distil(trainer: Any, config: Any, samples: list[Any]) -> None:
    """The teacher reads the samples as they are."""
    from megatron_rl.trainers.sdpo import Pair

    trainer._update_once([Pair(sample, sample, 1.0) for sample in samples])
    trainer.teacher.after_batch()


def on_rank(rank: int, name: str, path: str, port: int, out: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(CASES[name].world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    rows = measure(name, path)
    Path(out, f"{rank}.json").write_text(json.dumps(rows))


def run(name: str, scale: int) -> list[Measured]:
    """A case in processes of its own; the rows of all ranks."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        path = write_case(Path(folder), name, scale)
        torch.multiprocessing.spawn(on_rank, (name, str(path), port, folder), nprocs=CASES[name].world)
        ranks = range(CASES[name].world)
        return [Measured(*row) for rank in ranks for row in json.loads(Path(folder, f"{rank}.json").read_text())]


def fullest(rows: list[Measured]) -> list[Measured]:
    """Of each case, stage and part the rank that held most: a prediction is for that one."""
    found: dict[tuple[str, int, str], Measured] = {}
    for row in rows:
        key = row.case, row.stage, row.what
        if key not in found or row.measured > found[key].measured:
            found[key] = row
    return list(found.values())


def summary(rows: list[Measured], date: str) -> str:
    """For each case and part the stage whose ratio is farthest from one."""
    lines = [
        "# Predicted against measured memory",
        "",
        f"`tools/check_memory.py`, on a CPU, {date}. Megabytes of the fullest rank, in a pipeline of the stage that is",
        "farthest off; the ratio is of the prediction to what was measured. A moment counts what is held between steps",
        "too; `activations` is an update's peak without that.",
        "",
        "| case | what | predicted | measured | ratio |",
        "|---|---|---|---|---|",
    ]
    worst: dict[tuple[str, str], Measured] = {}
    for row in fullest(rows):
        known = worst.get((row.case, row.what))
        if known is None or abs(row.ratio - 1) > abs(known.ratio - 1):
            worst[row.case, row.what] = row
    for row in worst.values():
        sizes = f"{row.predicted / 1e6:.2f} | {row.measured / 1e6:.2f}"
        lines.append(f"| {row.case} | {row.what} | {sizes} | {row.ratio:.3f} |")
    farthest = max(worst.values(), key=lambda row: abs(row.ratio - 1))
    lines += ["", f"The farthest is {farthest.case}, {farthest.what}: {farthest.ratio:.3f}."]
    return "\n".join(lines) + "\n"


def write(out: Path, rows: list[Measured]) -> None:
    """The table and its summary, of what is there so far."""
    out.mkdir(parents=True, exist_ok=True)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with (out / "memory.csv").open("w", newline="") as lines:
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*Measured._fields, "date"])
        writer.writerows([*row, date] for row in rows)
    (out / "summary.md").write_text(summary(rows, date))


def main(say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/results/memory"))
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--scale", type=int, default=1, help="of a micro-batch's tokens, 512 each")
    arguments = parser.parse_args()
    rows: list[Measured] = []
    for name in arguments.only:
        found = run(name, arguments.scale)
        rows += found
        say(f"{name}: " + ", ".join(f"{r.what} {r.ratio:.3f}" for r in fullest(found)))
        write(arguments.out, rows)


if __name__ == "__main__":
    main()
