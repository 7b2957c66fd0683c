"""The sizing tables of docs/cluster.md, from the planner: writes them into the page, between its markers.

    python tools/size_cluster.py

Nothing is read but this file: the models' shapes are those of their public config.json, named below.
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megatron_rl.config.load import load_config
from megatron_rl.models.hf_config import ModelShape, model_shape
from megatron_rl.planning.advice import fullest_rank, stages
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.memory import Case
from megatron_rl.planning.page import SPARE
from megatron_rl.planning.parameters import model_parameters
from megatron_rl.planning.schedule import longest_step, schedule

PAGE = Path(__file__).parents[1] / "docs" / "cluster.md"
BEGIN, END = "<!-- made by tools/size_cluster.py -->", "<!-- end -->"
MEMORY = 80 * 10**9
PROMPT, ANSWER = 1024, 3072
OPTIONS = {
    "model": {"path": "model", "dtype": "bfloat16"},
    "data": {"train": "train.jsonl", "max_prompt_tokens": PROMPT},
    "train": {"steps": 1, "batch_size": 128, "max_tokens_per_micro_batch": 2 * (PROMPT + ANSWER)},
    "rollout": {"group_size": 8, "max_new_tokens": ANSWER, "vllm": {"kv_cache_gb": 16.0, "sleep": True}},
    "run": {"dir": "run"},
}
COLUMNS = (
    "GPUs",
    "layout",
    "recompute",
    "policy",
    "other models",
    "update",
    "else",
    "colocated",
    "host",
    "micro-batches",
)
GRPO = {"trainer": "grpo"}
REFERENCE = {"trainer": "grpo", "kl": {"where": "loss"}}
SDPO = {"trainer": "sdpo"}
GAD = {"trainer": "gad"}


class Model(NamedTuple):
    """A public model: the numbers of its config.json, and where they are."""

    source: str
    config: dict[str, Any]


class Row(NamedTuple):
    """One line of a table."""

    what: str
    trainer: dict[str, Any]
    gpus: int
    parallel: dict[str, Any]


MODELS = {
    "Qwen3-8B": Model(
        "huggingface.co/Qwen/Qwen3-8B",
        {
            "model_type": "qwen3",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-30B-A3B": Model(
        "huggingface.co/Qwen/Qwen3-30B-A3B",
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3-70B": Model(
        "huggingface.co/meta-llama/Meta-Llama-3-70B",
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
        },
    ),
}


def layout(tp: int, *, pp: int = 1, vpp: int = 1, ep: int = 1, recompute: bool = True) -> dict[str, Any]:
    return {"tp": tp, "pp": pp, "vpp": vpp, "ep": ep, "sequence_parallel": tp > 1, "recompute": recompute}


ROWS = {
    "Qwen3-8B": [
        Row("GRPO", GRPO, 8, layout(1)),
        Row("GRPO", GRPO, 8, layout(2)),
        Row("GRPO", GRPO, 8, layout(4)),
        Row("GRPO", GRPO, 8, layout(4, recompute=False)),
        Row("GRPO", GRPO, 8, layout(2, pp=2)),
        Row("GRPO", GRPO, 64, layout(2)),
        Row("GRPO, reference", REFERENCE, 8, layout(4)),
        Row("SDPO", SDPO, 8, layout(4)),
        Row("GAD", GAD, 8, layout(4)),
        Row("GAD", GAD, 16, layout(4)),
    ],
    "Qwen3-30B-A3B": [
        Row("GRPO", GRPO, 8, layout(4, ep=8)),
        Row("GRPO", GRPO, 16, layout(4, ep=8)),
        Row("GRPO", GRPO, 32, layout(4, ep=8)),
        Row("GRPO", GRPO, 32, layout(4, ep=8, recompute=False)),
        Row("GRPO", GRPO, 32, layout(2, pp=2, ep=8)),
        Row("SDPO", SDPO, 32, layout(4, ep=16)),
        Row("GAD", GAD, 64, layout(4, ep=16)),
    ],
    "Llama-3-70B": [
        Row("GRPO", GRPO, 32, layout(8, pp=2)),
        Row("GRPO", GRPO, 32, layout(8, pp=4)),
        Row("GRPO", GRPO, 64, layout(8, pp=4)),
        Row("GRPO", GRPO, 64, layout(8, pp=4, vpp=2)),
        Row("GRPO", GRPO, 128, layout(8, pp=4, recompute=False)),
        Row("SDPO", SDPO, 64, layout(8, pp=4)),
        Row("GAD", GAD, 128, layout(8, pp=4)),
    ],
}


def shape_of(model: Model) -> ModelShape:
    """From the numbers alone."""
    from transformers import AutoConfig

    numbers = dict(model.config)
    return model_shape(AutoConfig.for_model(numbers.pop("model_type"), **numbers))


def planned(model: Model, row: Row, engine: str) -> Case:
    """The case of a row, with an engine of vLLM in the trainer's processes or on servers elsewhere."""
    shape = shape_of(model)
    sections = {**OPTIONS, **row.trainer, "parallel": row.parallel}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(yaml.safe_dump(sections))
        options = [f"rollout.engine={engine}", f"rollout.vllm.tp={row.parallel['tp']}"]
        config = load_config(path, [*options, *(["rollout.vllm.sleep=false"] if engine == "vllm_server" else [])])
    return Case(
        config=config,
        actor=shape,
        critic=shape.as_scalar() if row.trainer is GAD else None,
        layout=Layout.of(config.parallel, row.gpus),
    )


def line(model: Model, row: Row) -> str:
    """What is held, the peaks in an update and elsewhere, with either place of the engine, and the cut of a step."""
    served, together = (planned(model, row, engine) for engine in ("vllm_server", "vllm"))
    lengths = longest_step(served.config)
    cut = schedule(served.config, served.layout, lengths)
    ranks = stages(served, lengths)
    first = max(ranks, key=lambda rank: rank.between_steps)
    own = sum(first.held[part] for part in ("weights", "gradients", "optimizer"))
    where = row.parallel
    placed = " ".join(f"{name}={where[name]}" for name in ("tp", "pp", "vpp", "ep") if where[name] > 1) or "tp=1"
    cells = [
        row.what,
        str(row.gpus),
        placed,
        "yes" if where["recompute"] else "no",
        f"{own / 1e9:.1f}",
        f"{(first.between_steps - own) / 1e9:.1f}",
        judged(max(rank.at(name) for rank in ranks for name in rank.moments if "update" in name)),
        judged(max(rank.at(name) for rank in ranks for name in rank.moments if "update" not in name)),
        judged(fullest_rank(together, lengths).peak),
        f"{max(rank.host['a save'] for rank in ranks) / 1e9:.1f}",
        str(cut.micro_batches),
    ]
    return "| " + " | ".join(cells) + " |"


def judged(peak: int) -> str:
    """Gigabytes, in brackets where they leave less than is to be left."""
    text = f"{peak / 1e9:.1f}"
    return text if peak <= (1 - SPARE) * MEMORY else f"({text})"


def tables() -> str:
    """All of them, one model after the other."""
    parts = []
    for name, model in MODELS.items():
        parts += [
            f"### {name}",
            "",
            f"{model_parameters(shape_of(model)) / 1e9:.2f}B parameters; config.json of {model.source}.",
            "",
            f"| | {' | '.join(COLUMNS)} |",
            "|---" * (1 + len(COLUMNS)) + "|",
            *(line(model, row) for row in ROWS[name]),
            "",
        ]
    return "\n".join(parts)


def written(page: str) -> str:
    """The page with its tables made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
