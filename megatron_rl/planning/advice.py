"""What to change where a run does not fit: options, and the bytes that each takes off the peak."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rl.config.rules import Config, check
from megatron_rl.config.schema import (
    DType,
    EngineName,
    ExpertIterationConfig,
    GrpoConfig,
    RolloutTrainerConfig,
    SdpoConfig,
    SftConfig,
)
from megatron_rl.models.hf_config import check_layout
from megatron_rl.planning.layout import Layout
from megatron_rl.planning.memory import Case, Footprint, footprint, longest_sample
from megatron_rl.planning.rollouts import answers
from megatron_rl.planning.schedule import schedule

Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Advice:
    """Options, as they are set on the command line, and the peak of the fullest rank with them."""

    options: Options
    peak: int

    def __str__(self) -> str:
        return " ".join(f"{key}={_shown(value)}" for key, value in self.options.items())


def stages(case: Case, lengths: Sequence[int]) -> list[Footprint]:
    """A rank of each pipeline stage; `lengths` are those of a step's samples."""
    micro_batches = schedule(case.config, case.layout, lengths).micro_batches
    return [footprint(case, stage, micro_batches) for stage in range(case.layout.pp)]


def fullest_rank(case: Case, lengths: Sequence[int]) -> Footprint:
    """That of the stage with the highest peak."""
    return max(stages(case, lengths), key=lambda found: found.peak)


def advise(case: Case, lengths: Sequence[int], room: int) -> tuple[list[Advice], Advice | None]:
    """Each option that lowers the peak, the most effective first; and the shortest row of them that fits in `room`.

    The row takes the most effective option of what is left, again and again; None where that is not enough.
    """
    first = _each(case, lengths)
    together: Options = {}
    while True:
        found = _each(case, lengths)
        if not found:
            return first, None
        together |= found[0].options
        changed = with_options(case, found[0].options)
        assert changed is not None
        case = changed
        if found[0].peak <= room:
            return first, Advice(together, found[0].peak)


def _each(case: Case, lengths: Sequence[int]) -> list[Advice]:
    before = fullest_rank(case, lengths).peak
    found = []
    for options in _candidates(case, max(lengths)):
        changed = with_options(case, options)
        if changed is not None and (after := fullest_rank(changed, lengths).peak) < before:
            found.append(Advice(options, after))
    return sorted(found, key=lambda advice: advice.peak)


def _candidates(case: Case, longest: int) -> Iterator[Options]:
    """Changes that leave the mathematics alone, and last the dtype, which does not."""
    config, parallel = case.config, case.config.parallel
    if not parallel.recompute:
        yield {"parallel.recompute": True}
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    yield {"parallel.tp": 2 * parallel.tp, "parallel.sequence_parallel": True}
    yield {"parallel.pp": 2 * parallel.pp}
    if case.actor.experts is not None:
        yield {"parallel.ep": 2 * parallel.ep}
    if isinstance(config, RolloutTrainerConfig):
        longest = longest_sample(config)
    if config.train.max_tokens_per_micro_batch // 2 >= longest:
        yield {"train.max_tokens_per_micro_batch": config.train.max_tokens_per_micro_batch // 2}
    if answers(config):
        yield from _of_engine(config)
    if isinstance(config, SftConfig | ExpertIterationConfig | GrpoConfig) and not config.average.offload:
        yield {"average.offload": True}
    if isinstance(config, SdpoConfig) and not config.teacher.offload:
        yield {"teacher.offload": True}
    if config.model.dtype is DType.float32:
        yield {"model.dtype": DType.bfloat16}


def _of_engine(config: Config) -> Iterator[Options]:
    rollout = config.rollout
    if rollout.engine is EngineName.vllm:
        if not rollout.vllm.sleep:
            yield {"rollout.vllm.sleep": True}
        yield {"rollout.vllm.tp": 2 * rollout.vllm.tp}
        yield {"rollout.vllm.kv_cache_gb": rollout.vllm.kv_cache_gb / 2}
    elif rollout.engine is EngineName.hf and rollout.max_sequences > 1:
        yield {"rollout.max_sequences": rollout.max_sequences // 2}


def with_options(case: Case, options: Mapping[str, Any]) -> Case | None:
    """The case with other options on the same number of ranks; None where that cannot be run."""
    config = copy.deepcopy(case.config)
    config.parallel.dp = None
    for key, value in options.items():
        *sections, name = key.split(".")
        place: Any = config
        for section in sections:
            place = getattr(place, section)
        setattr(place, name, value)
    parallel = config.parallel
    try:
        check(config)
        layout = Layout.of(parallel, case.world)
        for shape in (case.actor, case.critic):
            if shape is not None:
                check_layout(shape, parallel)
    except ValueError:
        return None
    return replace(case, config=config, layout=layout)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
