"""What a response is worth: reward functions by name, or the user's own.

A reward is called with a `Prompt`, a `Rollout` and its options as keywords, and returns a number or a `Reward`. It may
be an object with a method `prepare(**options)`: each worker process runs that once, before any deadline counts.
Nothing here imports torch, so that a worker process starts in a tenth of a second.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from megatron_rl.rewards.boxed import boxed
from megatron_rl.rewards.code import code
from megatron_rl.rewards.combined import combined
from megatron_rl.rewards.exact import exact, numeric
from megatron_rl.rewards.format import regex
from megatron_rl.rewards.gsm8k import gsm8k
from megatron_rl.rewards.math_verify import math_verify
from megatron_rl.rewards.r1_zero import r1_zero, r1_zero_strict
from megatron_rl.rewards.reasoning import reasoning
from megatron_rl.rewards.shaping import length, repetition
from megatron_rl.types import Reward

RewardFunction = Callable[..., Reward | float]

REWARDS: dict[str, RewardFunction] = {
    "exact": exact,
    "numeric": numeric,
    "regex": regex,
    "reasoning": reasoning,
    "r1_zero": r1_zero,
    "r1_zero_strict": r1_zero_strict,
    "boxed": boxed,
    "gsm8k": gsm8k,
    "math_verify": math_verify,
    "length": length,
    "repetition": repetition,
    "code": code,
    "combined": combined,
}


def resolve(name: str) -> RewardFunction:
    """The reward called `name`: one of `REWARDS`, `module:function`, or `path/to/file.py:function`."""
    if name in REWARDS:
        return REWARDS[name]
    place, colon, function_name = name.rpartition(":")
    if not colon:
        near = get_close_matches(name, REWARDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"reward={name!r} is unknown{hint}; use one of {', '.join(REWARDS)}, or name your own as "
            "'module:function' or 'path/to/file.py:function'"
        )
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"reward={name!r}: importing {place!r} failed with {type(error).__name__}: {error}; "
            "repair the module, or correct its name"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = get_close_matches(function_name, vars(module), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"reward={name!r}: {place!r} has no function {function_name!r}{hint}")
    return function


def _load_file(path: Path) -> ModuleType:
    """Import a file that need not be on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look a class's module up by name. A module that is already loaded keeps its name.
    loaded = sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if loaded is module:
            del sys.modules[path.stem]
        raise
    return module
