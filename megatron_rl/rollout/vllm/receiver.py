"""What vLLM's workers in a server learn: to take a new version of the weights, in place.

vLLM gives the methods of `Receiver` to its workers (`--worker-extension-cls`); they are called by name through its
`/collective_rpc`, which passes texts. `output` is "tied" where the output layer is the embedding. Both return the
checksum of each tensor that was taken.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.vllm import broadcast
from megatron_rl.rollout.vllm.experts import pack_experts_again
from megatron_rl.rollout.vllm.weights import read_weights, with_output_layer

TIED = "tied"
FROM_FILES, FROM_BROADCAST = "megatron_rl_take_files", "megatron_rl_take_broadcast"


class Receiver:
    """Names begin with the package's, so that they are not among a worker's own."""

    model_runner: Any
    rank: int
    device: torch.device

    def megatron_rl_take_files(self, output: str, folder: str, label: str) -> dict[str, int]:
        """What `WeightFiles` wrote."""
        return _take(self.model_runner, read_weights(Path(folder), label), output)

    def megatron_rl_take_broadcast(
        self, output: str, host: str, port: str, first: str, size: str, seconds: str
    ) -> dict[str, int]:
        """What `broadcast.send` sends; this server's first worker is number `first` of `size`."""
        store = broadcast.reach_store(host, int(port), float(seconds))
        group = broadcast.join(store, int(first) + self.rank, int(size), self.device, float(seconds))
        return _take(self.model_runner, broadcast.receive(store, group, self.device), output)


def _take(model_runner: Any, weights: Iterable[tuple[str, Tensor]], output: str) -> dict[str, int]:
    pack_experts_again()
    taken: dict[str, int] = {}

    def noting() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            taken[name] = checksum(tensor)
            yield name, tensor

    model_runner.reload_weights(weights_iterator=with_output_layer(noting(), output == TIED))
    return taken
