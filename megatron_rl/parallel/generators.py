"""The state of every generator of random numbers in this process: Python's, NumPy's, torch's, Megatron's."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from megatron_rl.parallel.device import ON_CPU

# isort: split
from megatron.core.tensor_parallel import get_cuda_rng_tracker

MEGATRON = "megatron/"


def generator_states() -> dict[str, Tensor]:
    """All states as tensors, by generator. Megatron keeps one per use, such as the model-parallel ranks' own."""
    version, words, gauss = random.getstate()
    assert version == 3, "Python's generator has changed"
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict) and state["bit_generator"] == "MT19937", "NumPy's default generator has changed"
    states = {
        "python": torch.tensor(words),
        # The second of a pair of normal numbers waits for the next call; NaN where none does.
        "python_gauss": torch.tensor([np.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor([*state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"]]),
        "numpy_gauss": torch.tensor([state["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if not ON_CPU:
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {MEGATRON + name: held for name, held in get_cuda_rng_tracker().get_states().items()}


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Takes back what `generator_states` gave out."""
    gauss = states["python_gauss"].item()
    random.setstate((3, tuple(states["python"].tolist()), None if np.isnan(gauss) else gauss))
    *key, pos, has_gauss = states["numpy"].tolist()
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": np.array(key, dtype=np.uint32), "pos": pos},
            "has_gauss": has_gauss,
            "gauss": states["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(states["torch"])
    if not ON_CPU:
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(MEGATRON): held for name, held in states.items() if name.startswith(MEGATRON)}
    get_cuda_rng_tracker().set_states(tracked)
