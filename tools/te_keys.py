"""What checkpoints are called under Transformer Engine's layers, learned without a GPU.

    make venv-te
    python tools/te_keys.py .venv-te-* > tests/dist/te_keys.json

The result is, for a tiny model of each family, the parameters' canonical names, and key and whole shape of each sharded
tensor. Parameters are made, and nothing is computed: tests/te/stand_in.py stands in for the compiled extension.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")


def main(directory: str) -> None:
    os.environ["MEGATRON_RL_TE"] = directory
    importlib.import_module("tests.te.ready")
    from megatron_rl.parallel.mesh import destroy_mesh
    from tests.dist.test_te_keys import names_and_keys
    from tests.models import tiny_model
    from tests.te.fused import run

    found = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            model = tiny_model(Path(folder), family, num_hidden_layers=2)
            names, keys = run(True, names_and_keys, str(model), {})
            found[family] = {"names": names, "keys": keys}
        destroy_mesh()
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1])
