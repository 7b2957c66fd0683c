"""Imported first in every process of these tests: Transformer Engine over its stand-in, then megatron-core over it."""

import os

from tests.te import references
from tests.te.stand_in import import_transformer_engine

# Names the folder that `make test-te` installs.
import_transformer_engine(os.environ["MEGATRON_RL_TE"])

import transformer_engine.pytorch as te  # noqa: E402

import megatron_rl.trainers.run  # noqa: E402, F401
from megatron_rl.parallel.cpu_adam import CpuAdam  # noqa: E402

# isort: split
import megatron.core.optimizer as optimizer  # noqa: E402
from megatron.core.optimizer import clip_grads, distrib_optimizer  # noqa: E402
from megatron.core.utils import (  # noqa: E402
    local_multi_tensor_applier,
    local_multi_tensor_l2_norm,
    local_multi_tensor_scale,
)

TAKEN = {
    "Adam": optimizer.Adam,
    "applier": clip_grads.multi_tensor_applier,
    "l2norm": clip_grads.l2_norm_impl,
    "scale": clip_grads.multi_tensor_scale_impl,
}
# Fused optimizers and multi-tensor functions need a GPU; what stands in for them is what runs on a CPU.
optimizer.Adam = distrib_optimizer.Adam = CpuAdam
for module in (clip_grads, optimizer.optimizer):
    module.multi_tensor_applier = local_multi_tensor_applier
    module.multi_tensor_scale_impl = local_multi_tensor_scale
clip_grads.l2_norm_impl = local_multi_tensor_l2_norm
references.install(te)
