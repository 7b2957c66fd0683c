"""One of the servers that a job's config names in `rollout.vllm.server.urls`. `srun` starts this once for each.

python -m megatron_rl.launch.rollout_server CONFIG a.b=c ...
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from megatron_rl.config.load import load_config
from megatron_rl.config.rules import Config
from megatron_rl.rollout.vllm.server import Launch
from megatron_rl.trainers.parts import server_options

ROOT = Path(__file__).parents[2]


def own_launch(config: Config, environment: Mapping[str, str]) -> tuple[Launch, int]:
    """How the server of this task of a Slurm step is started, and its port. Neighbours have the GPUs beside its own."""
    number, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    server, tp = config.rollout.vllm.server, config.rollout.vllm.tp
    url = urlsplit(server.urls[number])
    assert url.hostname is not None and url.port is not None
    gpus = tuple(range(local * tp, (local + 1) * tp)) if "SLURM_GPUS_ON_NODE" in environment else ()
    launch = Launch(
        options=server_options(config), host=url.hostname, python=server.python, gpus=gpus, log=Path(os.devnull)
    )
    return launch, url.port


def main() -> NoReturn:
    """Becomes the server."""
    path, *overrides = sys.argv[1:]
    launch, port = own_launch(load_config(path, overrides), os.environ)
    command, environment = launch.command(port), launch.environment(Path(tempfile.mkdtemp(prefix="megatron_rl-")))
    # The interpreter that has vLLM takes the weights by a class of this package.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
