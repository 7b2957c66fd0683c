"""Transformer Engine's Python layer on a machine without CUDA: its compiled extension is replaced by a stand-in.

Modules, parameters and signatures are Transformer Engine's own. The stand-in answers for every function of the
extension, so that it cannot show that one is missing; and it computes nothing.
"""

import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

EXTENSION = "transformer_engine_torch"
ENUMS = (
    "DType", "FP8FwdTensors", "FP8BwdTensors", "NVTE_Fused_Attn_Backend", "NVTE_QKV_Layout", "NVTE_QKV_Format",
    "NVTE_Mask_Type", "NVTE_Bias_Type", "NVTE_Softmax_Type", "CommOverlapType", "CommOverlapAlgo",
    "CommGemmOverlapRole", "Float8BlockScaleTensorFormat",
)  # fmt: skip
BASES = ("CommOverlapCore", "CommOverlapBase", "CommOverlapP2PBase", "CommOverlapHelper")


class Extension(types.ModuleType):
    """Every function is there, and does nothing."""

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


def import_transformer_engine(directory: str | Path) -> None:
    """From `directory`, over the stand-in. Before megatron-core, which asks for it when it is imported."""
    import torch  # noqa: F401  before Transformer Engine, which asks for its libraries

    assert "megatron.core" not in sys.modules, "megatron-core has been imported without Transformer Engine"
    sys.path.append(str(directory))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then loads no library
    extension = Extension(EXTENSION)
    extension.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    for name in ENUMS:
        setattr(extension, name, Members(name, (Member,), {}))
    for name in BASES:
        setattr(extension, name, type(name, (), {}))
    extension.get_cudnn_version = lambda: 91900
    extension.get_num_cublas_streams = lambda: 4
    extension.get_cublasLt_version = lambda: 130000
    sys.modules[EXTENSION] = extension
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import transformer_engine
        except FileNotFoundError:  # of its core library, which is not needed
            import transformer_engine
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda framework: None
        transformer_engine.pytorch = importlib.import_module("transformer_engine.pytorch")
