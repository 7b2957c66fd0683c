"""What checkpoints are called under Transformer Engine's layers, learned without a GPU.

    python tools/te_keys.py DIRECTORY > tests/dist/te_keys.json

DIRECTORY holds Transformer Engine's Python layer and what that imports, installed by `pip install --no-deps --target`:
transformer-engine and transformer-engine-cu13 2.11.0 (their .so files may go), pydantic, pydantic-core, zipp, einops,
annotated-types, typing-inspection, importlib-metadata, onnx, onnxscript, onnx_ir, ml_dtypes, protobuf, nvdlfw-inspect,
pyyaml and triton. A stand-in replaces its compiled extension: parameters are made, nothing is computed. The result is,
for a tiny model of each family, the parameters' canonical names, and key and whole shape of each sharded tensor.
"""

import importlib
import json
import os
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
ENUMS = (
    "DType", "FP8FwdTensors", "FP8BwdTensors", "NVTE_Fused_Attn_Backend", "NVTE_QKV_Layout", "NVTE_QKV_Format",
    "NVTE_Mask_Type", "NVTE_Bias_Type", "NVTE_Softmax_Type", "CommOverlapType", "CommOverlapAlgo",
    "CommGemmOverlapRole", "Float8BlockScaleTensorFormat",
)  # fmt: skip
BASES = ("CommOverlapCore", "CommOverlapBase", "CommOverlapP2PBase", "CommOverlapHelper")


class Extension(types.ModuleType):
    """Stands in for transformer_engine_torch: every function is there, and does nothing."""

    __file__ = "stand-in"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, mock.MagicMock(name=name))
        return getattr(self, name)


class Members(type):
    """A class whose attributes are its instances, whatever they are called."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, cls(name))
        return getattr(cls, name)


class Member:
    def __init__(self, name: str = "") -> None:
        self.name = name

    def __int__(self) -> int:
        return 0

    __index__ = __int__


def import_transformer_engine(directory: str) -> None:
    """From `directory`, over the stand-in."""
    sys.path.append(directory)
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then loads no library
    extension = Extension("transformer_engine_torch")
    extension.__spec__ = importlib.machinery.ModuleSpec("transformer_engine_torch", None)
    for name in ENUMS:
        setattr(extension, name, Members(name, (Member,), {}))
    for name in BASES:
        setattr(extension, name, type(name, (), {}))
    extension.get_cudnn_version = lambda: 91900
    extension.get_num_cublas_streams = lambda: 4
    extension.get_cublasLt_version = lambda: 130000
    sys.modules["transformer_engine_torch"] = extension
    try:
        import transformer_engine
    except FileNotFoundError as error:  # of its core library, which is not needed
        print(f"without {error.filename or error}", file=sys.stderr)
        import transformer_engine
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    transformer_engine.pytorch = importlib.import_module("transformer_engine.pytorch")


def names_and_keys(directory: Path) -> dict[str, Any]:
    """Of the model in `directory`, built with Transformer Engine's layers."""
    import torch

    import megatron_rl.parallel.device as device
    from megatron_rl.models import build
    from megatron_rl.models.exchange import named_parameters
    from megatron_rl.models.hf_config import load_shape
    from megatron_rl.models.layer_specs import fused_layer_spec
    from megatron_rl.parallel.mesh import create_mesh, destroy_mesh

    mesh = create_mesh()
    with (
        mock.patch.object(device, "ON_CPU", False),
        mock.patch.object(device, "device", lambda: torch.device("cpu")),
        mock.patch.object(build, "layer_spec", lambda config, stage: fused_layer_spec(config)),
        mock.patch("torch.cuda.is_available", lambda: True),
    ):
        (model,) = build.build_model(load_shape(directory), mesh, torch.float32)
    names = sorted(name for name, _ in named_parameters([model]))
    tree = model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": mesh.dp_group})
    destroy_mesh()
    return {"names": names, "keys": {key: list(shape) for key, shape in sharded(tree).items()}}


def sharded(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Key and whole shape of each tensor of a sharded state, without extra state."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    tree = {name: value for name, value in tree.items() if not name.endswith("_extra_state")}
    apply_factories(tree)
    return {item.key: item.global_shape for item in nested_values(tree) if isinstance(item, ShardedTensor)}


def main(directory: str) -> None:
    import torch  # noqa: F401  before Transformer Engine, which asks for its libraries

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import_transformer_engine(directory)
        from tests.models import tiny_model

        found = {}
        for family in ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral"):
            with tempfile.TemporaryDirectory() as folder:
                found[family] = names_and_keys(tiny_model(Path(folder), family, num_hidden_layers=2))
    print(json.dumps(found, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1])
