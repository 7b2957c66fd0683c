"""What a run says of itself when it starts: versions, what was found, device, layout, model, memory."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import psutil
import torch

import megatron_rl
from megatron_rl.config.rules import Config
from megatron_rl.models.transformer_engine import WEIGHT_GRADIENTS
from megatron_rl.parallel import device
from megatron_rl.parallel.mesh import Mesh
from megatron_rl.workers.average import WeightAverage
from megatron_rl.workers.critic import CriticWorker
from megatron_rl.workers.model_worker import ModelWorker

GIB = 2**30
NEEDED = ("torch", "megatron-core", "transformers")


def banner(
    config: Config,
    mesh: Mesh,
    actor: ModelWorker,
    critic: CriticWorker | None,
    average: WeightAverage | None,
    done: int,
) -> str:
    """One block of lines. `done`: steps that an earlier process has done."""
    parallel = config.parallel
    cuts = f"tp={mesh.tp_size} pp={mesh.pp_size} vpp={mesh.vpp_size} dp={mesh.dp_size}"
    if actor.shape.experts:
        cuts += f" ep={mesh.ep_size} etp={mesh.etp_size}"
    ways = [name for name in ("sequence_parallel", "recompute") if getattr(parallel, name)]
    used, total, place = _memory()
    beside = {"the critic's": critic, "average": average}
    kept = "".join(
        f"{name} {model.state_bytes() / GIB:.3f} GiB; " for name, model in beside.items() if model is not None
    )
    lines = {
        "megatron_rl": f"{megatron_rl.__version__}, trainer {config.trainer}; "
        + (f"continues after step {done}" if done else "starts"),
        "versions": f"python {platform.python_version()}, "
        + ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core", "transformers")
        ),
        "found": ", ".join(f"{name} {found}" for name, found in _optional().items()),
        "engine": f"{config.rollout.engine.value} answers prompts",
        "device": device.describe(),
        "layout": f"{', '.join([cuts, *ways])}; {mesh.world_size} process(es)",
        "model": f"{actor.num_parameters:,} parameters, {config.model.dtype.value}, {config.model.path} "
        f"({config.model.weights})",
        "memory": f"weights, gradients and optimizer {actor.state_bytes() / GIB:.3f} GiB on this rank; {kept}"
        f"{used / GIB:.1f} of {total / GIB:.1f} GiB in use on {place}",
        "run directory": str(Path(config.run.dir)),
    }
    return "\n".join(f"{name:<14} {text}" for name, text in lines.items())


def _optional() -> dict[str, str]:
    """Libraries that make a run faster, by version or as absent. PyPI's `apex` is another library than NVIDIA's."""
    found = {}
    for name, module, package in (
        ("Transformer Engine", "transformer_engine", "transformer-engine"),
        ("apex", "amp_C", "apex"),
        ("apex's weight gradients", WEIGHT_GRADIENTS, "apex"),
        ("vLLM", "vllm", "vllm"),
    ):
        found[name] = "absent" if importlib.util.find_spec(module) is None else _version(package)
    return found


def _version(package: str) -> str:
    """The installed version; a library built in place may have none."""
    held = {item.metadata["Name"].lower(): item.version for item in importlib.metadata.distributions()}
    return next((version for name, version in held.items() if name.startswith(package)), "found")


def _memory() -> tuple[int, int, str]:
    """(used, total, of what) in bytes."""
    if device.ON_CPU:
        memory = psutil.virtual_memory()
        return memory.total - memory.available, memory.total, "this machine"
    free, total = torch.cuda.mem_get_info()
    return total - free, total, "this GPU"
