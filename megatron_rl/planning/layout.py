"""The sizes of a layout, without the processes of `parallel/mesh.py`."""

from dataclasses import dataclass

from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Ranks along each axis; the world is tp x pp x dp, and the tp x dp of a stage are ep x etp x expert_dp."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False
    recompute: bool = False

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> "Layout":
        """The layout on `world` ranks; ConfigError where they cannot be divided so."""
        along = parallel.tp * parallel.pp
        if world % along or parallel.dp not in (None, world // along):
            dp = "" if parallel.dp is None else f", parallel.dp={parallel.dp}"
            raise ConfigError(
                f"parallel.tp={parallel.tp}, parallel.pp={parallel.pp}{dp} do not fit {world} GPUs: give a multiple of "
                f"{along}{'' if parallel.dp is None else ', and parallel.dp=null or what is left over'}"
            )
        if world // parallel.pp % (parallel.ep * parallel.etp):
            raise ConfigError(
                f"parallel.ep={parallel.ep} times parallel.etp={parallel.etp} does not divide the "
                f"{world // parallel.pp} GPUs of a pipeline stage: give another number of GPUs, or change one of them"
            )
        return cls(
            tp=parallel.tp,
            pp=parallel.pp,
            vpp=parallel.vpp,
            dp=world // along,
            ep=parallel.ep,
            etp=parallel.etp,
            sequence_parallel=parallel.sequence_parallel,
            recompute=parallel.recompute,
        )

    @property
    def expert_dp(self) -> int:
        """Ranks that hold copies of the same experts."""
        return self.tp * self.dp // (self.ep * self.etp)

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Forward passes of one model chunk whose backward pass is still to come, at most, on a stage.

        1F1B: pp - stage. Interleaved: the warm-up of 2 (pp - stage - 1) + (vpp - 1) pp passes, and one.
        """
        if self.vpp == 1:
            return min(micro_batches, self.pp - stage)
        warm_up = 2 * (self.pp - stage - 1) + (self.vpp - 1) * self.pp
        return min(micro_batches * self.vpp, warm_up + 1)

    def split(self, tokens: int) -> int:
        """Tokens of a micro-batch between the tensor-parallel regions of a layer."""
        return -(-tokens // self.tp) if self.sequence_parallel else tokens
