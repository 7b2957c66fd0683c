"""The planner's answer as text."""

import re
from collections.abc import Sequence

from megatron_rl.config.rules import ConfigError
from megatron_rl.config.schema import EngineName
from megatron_rl.planning.activations import Build
from megatron_rl.planning.advice import advise, stages
from megatron_rl.planning.memory import Case, Footprint
from megatron_rl.planning.rollouts import answers, keys_values, longest_answer, served_bytes
from megatron_rl.planning.schedule import Schedule, schedule
from megatron_rl.planning.step_time import describe_step

UNITS = {"GB": 10**9, "GiB": 2**30, "MB": 10**6, "MiB": 2**20}
# Of a device, for what is not counted: CUDA's context, NCCL's buffers, kernels' workspaces, gaps between blocks.
SPARE = 0.1
SHOWN_OPTIONS = 6


def parse_memory(text: str) -> int:
    """Bytes of a size such as 80GB (10^9 each) or 80GiB (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GiB|MB|MiB)", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"--memory={text!r} is no size: give a number and {', '.join(UNITS)}, as 80GB")
    return int(float(match[1]) * UNITS[match[2]])


def shown(size: int) -> str:
    """Gigabytes, or megabytes of what is small."""
    return f"{size / 1e9:.2f} GB" if abs(size) >= 1e8 else f"{size / 1e6:.2f} MB"


def describe_plan(case: Case, lengths: Sequence[int], memory: int) -> tuple[str, bool]:
    """The fullest rank's bytes, what to change where they are too many, and whether they fit.

    `lengths` are those of a step's samples.
    """
    ranks, room = stages(case, lengths), int((1 - SPARE) * memory)
    found = max(ranks, key=lambda rank: rank.peak)
    fits = found.peak <= room
    verdict = "fits" if fits else f"does not fit: {shown(found.peak - room)} too much"
    lines = [
        *_heading(case, found),
        *_table(found),
        "",
        *(f"stage {rank.stage}: peak {shown(rank.peak)}, {rank.fullest}" for rank in ranks if len(ranks) > 1),
        f"peak {shown(found.peak)} of {shown(memory)}, {SPARE:.0%} of it left for what is not counted: {verdict}",
        *([] if fits else _advice(case, lengths, found.peak, room)),
        *_beside(case, found),
        *_cut(schedule(case.config, case.layout, lengths)),
        "",
        *describe_step(case, lengths),
    ]
    return "\n".join(lines), fits


def _heading(case: Case, found: Footprint) -> list[str]:
    layout = case.layout
    experts = "" if case.actor.experts is None else f" ep={layout.ep} etp={layout.etp}"
    how = (
        "predicted for Transformer Engine on CUDA, where it was never measured"
        if case.build is Build.te
        else "predicted for the layers that run on a CPU"
    )
    return [
        f"memory of one of {case.world} ranks, tp={layout.tp} pp={layout.pp} vpp={layout.vpp} dp={layout.dp}{experts}",
        f"the fullest: stage {found.stage} of {layout.pp}; {how}",
    ]


def _table(found: Footprint) -> list[str]:
    """What is held, what each moment adds, and all there is in it."""
    names = [*found.held, *found.moments]
    width = max(map(len, names)) + 2
    lines = [f"  {name:<{width}}{shown(size):>11}" for name, size in found.held.items()]
    lines.append(f"  {'held between steps':<{width}}{shown(found.between_steps):>11}")
    for name in sorted(found.moments, key=found.at, reverse=True):
        added = ", ".join(f"{part} {shown(size)}" for part, size in found.moments[name].items() if size)
        lines.append(f"  {name:<{width}}{shown(found.at(name)):>11}  {added}")
    return lines


def _advice(case: Case, lengths: Sequence[int], peak: int, room: int) -> list[str]:
    each, together = advise(case, lengths, room)
    lines = ["to change:"] if each else []
    for advice in each[:SHOWN_OPTIONS]:
        end = ", and it fits" if advice.peak <= room else ""
        other = "; the numbers become others" if "model.dtype" in advice.options else ""
        lines.append(f"  {advice}  takes off {shown(peak - advice.peak)}{end}{other}")
    if together is None:
        lines.append("  no row of such options fits: take more GPUs, or a smaller model")
    elif not each or each[0].peak > room:
        lines.append(f"  together they fit: {together}  (peak {shown(together.peak)})")
    return lines


def _beside(case: Case, found: Footprint) -> list[str]:
    """The host's memory, and the engine's room for answers."""
    config, rollout = case.config, case.config.rollout
    lines = [f"host memory of the rank, {name}: {shown(size)}" for name, size in found.host.items()]
    if not answers(config) or rollout.engine is EngineName.hf:
        return lines
    heads = case.actor.num_kv_heads
    one = keys_values(case.actor, case.width, longest_answer(config)) * -(-heads // rollout.vllm.tp) // heads
    at_once = int(rollout.vllm.kv_cache_gb * 2**30) // one
    lines.append(
        f"the engine's cache holds {at_once} answers at their longest, {shown(one)} each; "
        f"rollout.max_sequences={rollout.max_sequences}"
    )
    if rollout.engine is EngineName.vllm_server:
        lines.append(
            f"each process of a server, on a GPU of its own: {shown(served_bytes(config, case.actor, case.width))}"
        )
    return lines


def _cut(cut: Schedule) -> list[str]:
    least, most = cut.tokens
    return [
        f"a step: {cut.updates} update(s) of {cut.samples} samples, in {cut.micro_batches} micro-batch(es) per rank of "
        f"{least} to {most} tokens; a pipeline's stage waits {cut.bubble:.0%} of the time"
    ]
