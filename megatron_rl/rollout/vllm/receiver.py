"""What vLLM's workers in a server learn: to take a new version of the weights from files, in place.

vLLM gives the methods of `Receiver` to its workers (`--worker-extension-cls`); they are called by name through its
`/collective_rpc`, which passes texts.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rl.rollout.checksum import checksum
from megatron_rl.rollout.vllm.experts import pack_experts_again
from megatron_rl.rollout.vllm.weights import read_weights, with_output_layer

TIED = "tied"


class Receiver:
    """Names begin with the package's, so that they are not among a worker's own."""

    model_runner: Any

    def megatron_rl_receive(self, folder: str, label: str, output: str) -> dict[str, int]:
        """Loads what `WeightFiles` wrote; `output` is "tied" or not. The checksum of each tensor that was taken."""
        pack_experts_again()
        taken: dict[str, int] = {}

        def noting() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in read_weights(Path(folder), label):
                taken[name] = checksum(tensor)
                yield name, tensor

        self.model_runner.reload_weights(weights_iterator=with_output_layer(noting(), output == TIED))
        return taken
