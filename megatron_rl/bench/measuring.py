"""Seconds, memory, and the rates that a machine can reach: all measured in this process."""

import ctypes
import platform
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_rl.bench.rows import Clock, Machine
from megatron_rl.ops import products

Work = Callable[[], object]
_ORDER = 1024  # of the square matrices that a rate of products is measured with
_COPIED = 256 * 2**20  # bytes that a rate of copies is measured with


class Turns(NamedTuple):
    """Seconds per call of each side, one for every turn."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, side: str) -> float:
        return median(self.seconds[side])

    def ratio(self, side: str, baseline: str) -> float:
        """The median of the turns' ratios: what slows a whole turn down cancels."""
        return median(a / b for a, b in zip(self.seconds[side], self.seconds[baseline], strict=True))


def take_turns(
    sides: Mapping[str, Work], repeats: int, *, clock: Clock = "cpu", calls: Mapping[str, int] | None = None
) -> Turns:
    """Times every side `repeats` times, one after the other in each turn. What is done once only is done before.

    A side that is short is called `calls` times in a turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            seconds[name].append(timed(work, (calls or {}).get(name, 1), clock=clock))
    return Turns({name: tuple(values) for name, values in seconds.items()})


def timed(work: Work, calls: int = 1, *, clock: Clock = "cpu") -> float:
    """Seconds per call."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    for _ in range(calls):
        work()
    return (now() - start) / calls


def gemm_rate(dtype: torch.dtype, *, clock: Clock = "cpu") -> float:
    """FLOP per second of a 1024^3 product: per core with `cpu`, of all threads with `wall`. Medians of five.

    The better of the two products that a layer's forward pass and its weight's gradient are: a b^T and a^T b; in
    bfloat16 on a CPU without instructions for it, of factors that are widened as training widens them.
    """
    a, b = (torch.randn(_ORDER, _ORDER).to(dtype) for _ in range(2))
    out, seconds = torch.empty_like(a), []
    for left, right in ((a, b.t()), (a.t(), b)):
        work = partial(_product, left, right, out)
        work()
        seconds.append(median(timed(work, clock=clock) for _ in range(5)))
    return 2 * _ORDER**3 / min(seconds)


def _product(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    return products.mm(left.to(products.factor_dtype(left)), right, out=out)


def copy_rate(*, clock: Clock = "cpu") -> float:
    """Bytes per second, read ones and written ones together, of a copy from memory to memory. Median of ten."""
    source, target = torch.ones(_COPIED // 4), torch.zeros(_COPIED // 4)
    target.copy_(source)
    return 2 * _COPIED / median(timed(lambda: target.copy_(source), clock=clock) for _ in range(10))


def resident() -> int:
    """Bytes of this process that are in memory, once what was freed has been given back."""
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def peak_of(work: Work) -> int:
    """The most bytes that were in memory at once during the work."""
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's mark starts anew
    work()
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def this_machine() -> Machine:
    described = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return Machine(
        cpu=described[0].partition(":")[2].strip() if described else platform.machine(),
        capability=torch.backends.cpu.get_cpu_capability(),
        cores=torch.multiprocessing.cpu_count(),
        torch=torch.__version__,
    )
