"""TRL's half of tools/bench_vs_trl.py: trains as a workload says, and writes one line of JSON per step.

    .venv-trl-<hash>/bin/python tools/trl_side.py WORKLOAD.json STEPS.jsonl

Runs in TRL's environment, and under torchrun in several processes. Rank 0 writes: `gen` are the seconds in the call
that draws completions, `tokens` those of all ranks' completions, `end` is the time of day when the step was over,
`targets` the share of rows whose teacher reads more than the student (sdpo).
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from odd_word import odd_word
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer


def judge(completions: Sequence[str], **_: Any) -> list[float]:
    return [odd_word(text) for text in completions]


class Recorder(TrainerCallback):
    """Writes what the last step was made of."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1)
        self.trainer: Any = None
        self.seconds = 0.0
        self.lengths: list[int] = []

    def drawn(self, seconds: float, completions: Sequence[Sequence[int]]) -> None:
        self.seconds += seconds
        self.lengths += map(len, completions)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mine = torch.tensor(self.lengths)
        lengths = self.trainer.accelerator.gather(mine)
        assert len(lengths) == args.generation_batch_size, "a step did not draw its whole batch"
        row: dict[str, float | None] = {"end": time.time(), "gen": self.seconds}
        row |= {"tokens": int(lengths.sum()), "longest": int(lengths.max())}
        shown = self.trainer._metrics["train"].get("self_distillation/reprompt_sample_fraction")
        row["targets"] = shown[-1] if shown else None
        if state.is_world_process_zero:
            self.file.write(json.dumps(row) + "\n")
        self.seconds, self.lengths = 0.0, []


class TimedGRPO(GRPOTrainer):
    recorder: Recorder

    def _generate_single_turn(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        completions, log_probs = super()._generate_single_turn(*arguments, **options)
        self.recorder.drawn(time.perf_counter() - start, completions)
        return completions, log_probs


class TimedSDPO(SDPOTrainer):
    recorder: Recorder

    def _generate(self, prompt_ids: list[list[int]]) -> Any:
        start = time.perf_counter()
        prompts, completions = super()._generate(prompt_ids)
        self.recorder.drawn(time.perf_counter() - start, completions)
        return prompts, completions


def arguments(workload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What both trainers are told. Nothing is logged, saved or recomputed."""
    samples = workload["prompts"] * workload["group"]
    rows = min(workload["trl_rows"], samples // workload["processes"])
    return {
        "output_dir": str(folder / "trl"),
        "use_cpu": True,
        "bf16": workload["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "max_steps": workload["steps"],
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": samples // workload["processes"] // rows,
        "num_generations": workload["group"],
        "max_completion_length": workload["new_tokens"],
        "learning_rate": workload["lr"],
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "num_iterations": 1,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 1,
    }


def main() -> None:
    workload = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2])
    recorder = Recorder(out if os.environ.get("RANK", "0") == "0" else Path(os.devnull))
    common = arguments(workload, out.parent)
    shared: dict[str, Any] = {
        "model": workload["model"],
        "reward_funcs": judge,
        "train_dataset": Dataset.from_json(workload["data"]),
        "callbacks": [recorder],
    }
    trainer: TimedGRPO | TimedSDPO
    if workload["trainer"] == "sdpo":
        options = SDPOConfig(
            distillation_mode="topk_logits",
            distillation_topk=workload["topk"],
            distillation_add_tail=True,
            distillation_alpha=0.5,
            model_init_kwargs={"dtype": "float32"},
            **common,
        )
        trainer = TimedSDPO(args=options, **shared)
    else:
        options = GRPOConfig(
            use_transformers_continuous_batching=workload["continuous"],
            model_init_kwargs={"dtype": "float32"},
            **common,
        )
        trainer = TimedGRPO(args=options, **shared)
    trainer.recorder, recorder.trainer = recorder, trainer
    trainer.train()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # its threads abort a process that ends with them


if __name__ == "__main__":
    main()
