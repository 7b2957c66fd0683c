"""What is logged of one optimizer step."""

from megatron_rl.metrics.types import Max, Mean, Metrics, Sum
from megatron_rl.workers.model_worker import StepResult


def update_metrics(model: str, stats: Metrics, result: StepResult) -> Metrics:
    """A pass's figures and `model`/*. Merged over updates a loss is the mean, the norm the largest, skips a count."""
    return {name: Mean(value.value, 1) if isinstance(value, Sum) else value for name, value in stats.items()} | {
        f"{model}/grad_norm": Max(result.grad_norm),
        f"{model}/lr": Mean(result.lr, 1),
        f"{model}/skipped": Sum(float(not result.applied)),
    }


def results(metrics: Metrics) -> dict[str, float]:
    """The figures themselves."""
    return {name: value.result() for name, value in metrics.items()}
