"""The predictions of docs/performance.md, from planning/step_time.py: writes them into the page, between its markers.

    python tools/predict_steps.py

Models and options are those of tools/size_cluster.py, with vLLM in the trainer's processes. Nothing is measured.
"""

from pathlib import Path

from size_cluster import GRPO, MODELS, Row, layout, planned

from megatron_rl.planning.machine import H100, H200
from megatron_rl.planning.schedule import longest_step
from megatron_rl.planning.step_time import products_share, step_seconds

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- made by tools/predict_steps.py -->", "<!-- predicted -->"
COLUMNS = (
    "model",
    "GPUs",
    "layout",
    "recompute",
    "gen",
    "update",
    "step",
    "tokens/s per GPU",
    "products",
    "step, H200",
)
ROWS = {
    "Qwen3-8B": [
        *(Row("", GRPO, gpus, layout(2)) for gpus in (8, 16, 32, 64)),
        Row("", GRPO, 8, layout(4, recompute=False)),
        Row("", GRPO, 64, layout(4, recompute=False)),
    ],
    "Qwen3-30B-A3B": [Row("", GRPO, 32, layout(4, ep=8))],
    "Llama-3-70B": [
        Row("", GRPO, 64, layout(8, pp=4)),
        Row("", GRPO, 128, layout(8, pp=4)),
        Row("", GRPO, 128, layout(8, pp=4, recompute=False)),
        Row("", GRPO, 128, layout(8, pp=4, vpp=5, recompute=False)),
    ],
}


def line(name: str, row: Row) -> str:
    case = planned(MODELS[name], row, "vllm")
    lengths = longest_step(case.config)
    found, other = (step_seconds(case, lengths, machine) for machine in (H100, H200))
    step, slower = (sum(of.total for of in phases.values()) for phases in (found, other))
    where = row.parallel
    cells = [
        name,
        str(row.gpus),
        " ".join(f"{axis}={where[axis]}" for axis in ("tp", "pp", "vpp", "ep") if where[axis] > 1),
        "yes" if where["recompute"] else "no",
        f"{found['gen'].total:.0f} s",
        f"{found['update_actor'].total:.1f} s",
        f"{step:.0f} s",
        f"{sum(lengths) / step / row.gpus:,.0f}",
        f"{products_share(case, lengths, H100):.0%}",
        f"{slower:.0f} s",
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    lines = (line(name, row) for name, rows in ROWS.items() for row in rows)
    return "\n".join(["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|", *lines])


def written(page: str) -> str:
    """The page with its table made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
