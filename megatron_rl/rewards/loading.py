"""A reward made ready to judge, with its options checked, and what it returns made plain."""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

from megatron_rl.rewards import resolve
from megatron_rl.types import Reward

_TYPES: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}


def load_reward(name: str, options: Mapping[str, Any]) -> Callable[..., object]:
    """The reward with its options, everything checked that can be checked without a response."""
    function = resolve(name)
    signature = inspect.signature(function)
    try:
        signature.bind("prompt", "rollout", **options)
    except TypeError as error:
        raise ValueError(
            f"reward={name!r} takes {signature} and does not accept the options {options} ({error}); correct them"
        ) from error
    for option, value in options.items():
        _check_option(name, option, value, signature)
    if prepare := getattr(function, "prepare", None):
        prepare(**options)
    return partial(function, **options)


def _check_option(name: str, option: str, value: Any, signature: inspect.Signature) -> None:
    """An option whose parameter is annotated as a plain type is of that type; a whole number is a float, too."""
    wanted = signature.parameters[option].annotation if option in signature.parameters else None
    if wanted not in _TYPES:
        return
    fits = type(value) is wanted or (wanted is float and type(value) is int)
    if not fits or (wanted is float and not abs(value) < math.inf):
        raise ValueError(f"reward={name!r}: the option {option}={value!r} must be {_TYPES[wanted]}; correct it")


def as_reward(result: object) -> Reward:
    """What the function returned, as a reward of plain floats that the trainer can read without its libraries."""
    if isinstance(result, Real):
        result = Reward(value=float(result))
    if not isinstance(result, Reward) or not isinstance(result.value, Real):
        return failed(f"wrong type: {type(getattr(result, 'value', result)).__name__}")
    value = float(result.value)
    parts = {name: float(part) for name, part in result.parts.items()}
    if not all(map(math.isfinite, (value, *parts.values()))):
        return failed(result.reason or "not finite", result.feedback)
    if result.reason is not None:
        raise ValueError(
            f"Reward has the finite value {value} and the reason {result.reason!r}; a reason goes with NaN"
        )
    return Reward(value=value, parts=parts, feedback=result.feedback)


def failed(reason: str, feedback: str | None = None) -> Reward:
    """The reward of a response that could not be judged."""
    return Reward(value=math.nan, reason=reason, feedback=feedback)
