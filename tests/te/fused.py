"""The package's models of Transformer Engine's layers, on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.dist.pool import Pool


@contextmanager
def fused_layers() -> Iterator[None]:
    """`build_model` builds as on CUDA, but on this device and without Transformer Engine's rotary kernel."""
    import megatron_rl.parallel.device as device
    from megatron_rl.models import build
    from megatron_rl.models.layer_specs import fused_layer_spec
    from megatron_rl.workers import sharded_model

    build_model = build.build_model

    def fused(*args: Any) -> list[Any]:
        with (
            mock.patch.object(device, "ON_CPU", False),
            mock.patch.object(device, "device", lambda: torch.device("cpu")),
            mock.patch.object(build, "layer_spec", lambda config, stage: fused_layer_spec(config)),
            mock.patch("torch.cuda.is_available", lambda: True),
        ):
            models = build_model(*args)
        for model in models:
            model.config.apply_rope_fusion = model.config.deallocate_pipeline_outputs = False
        return models

    with mock.patch.object(build, "build_model", fused), mock.patch.object(sharded_model, "build_model", fused):
        yield


def run(fused: bool, job: Callable[..., Any], *args: Any) -> Any:
    """A job of tests/dist with either layers."""
    if not fused:
        return job(*args)
    with fused_layers():
        return job(*args)


class FusedPool:
    """The pool, whose jobs run on Transformer Engine's layers."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def run(self, job: Callable[..., Any], world: int, *args: Any) -> list:
        return self.pool.run(run, world, True, job, *args)
