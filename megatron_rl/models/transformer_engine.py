"""Transformer Engine's operators: which ones run on CUDA, and that the installed version takes what they are given.

This is the only file that asks for Transformer Engine. megatron-core calls the operators: the layers and attention over
packed sequences through `layer_specs.fused_layer_spec`; in its optimizer Adam and the `multi_tensor` functions, for the
norm of the gradients and their clipping.

`parallel_cross_entropy` is left out, for supervised training too. It takes whole logits, keeps them for the backward
pass and rounds their gradient to the logits' dtype before it is scaled. It counts all columns, so that the padding of a
vocabulary would have to be overwritten first; and it knows no entropy, which is always measured. The operator of
`ops/linear_stats.py` reads and writes the logits no more often, and above 128 MiB keeps none.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
from types import ModuleType
from typing import Any, NamedTuple

from megatron_rl.types import RunError


class Operator(NamedTuple):
    """A name in transformer_engine.pytorch, and the parameters that are passed to it by name."""

    name: str
    parameters: tuple[str, ...]


_LAYER = ("sequence_parallel", "params_dtype", "device")
_LINEAR = (
    "in_features", "out_features", "fuse_wgrad_accumulation", "tp_group", "tp_size", "get_rng_state_tracker",
    "init_method", "bias", "return_bias", "parallel_mode", *_LAYER,
)  # fmt: skip
OPERATORS = (
    Operator("RMSNorm", ("hidden_size", "eps", "zero_centered_gamma", *_LAYER)),
    Operator("Linear", _LINEAR),
    Operator("Linear.forward", ("is_first_microbatch",)),
    Operator(
        "LayerNormLinear", (*_LINEAR, "eps", "normalization", "return_layernorm_output", "zero_centered_gamma")
    ),
    Operator("LayerNormLinear.forward", ("is_first_microbatch",)),
    Operator("GroupedLinear", ("num_gemms", *_LINEAR)),
    Operator("GroupedLinear.forward", ("is_first_microbatch",)),
    Operator(
        "DotProductAttention",
        ("num_attention_heads", "kv_channels", "num_gqa_groups", "attention_dropout", "attn_mask_type", "tp_size",
         "tp_group", "sequence_parallel", "get_rng_state_tracker", "layer_number", "softmax_scale"),
    ),
    Operator(
        "DotProductAttention.forward",
        ("attn_mask_type", "qkv_format", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"),
    ),
    Operator("optimizers.FusedAdam", ("lr", "betas", "eps", "weight_decay", "adam_w_mode")),
    # Compiled functions tell no parameters.
    Operator("optimizers.multi_tensor_applier", ()),
    Operator("optimizers.multi_tensor_l2norm", ()),
    Operator("optimizers.multi_tensor_scale", ()),
)  # fmt: skip

PACKAGE = "transformer_engine"
# Of apex: megatron-core's own layers ask for it where layers add their weights' gradients to `main_grad` themselves.
WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"


def accumulates_weight_gradients() -> bool:
    """Whether linear layers can add their weights' gradients to `main_grad`: also GPTModel's output layer must."""
    return all(importlib.util.find_spec(name) is not None for name in (PACKAGE, WEIGHT_GRADIENTS))


def check() -> None:
    """Refuses to start where Transformer Engine is missing or lacks what is called."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise RunError(
            "training on CUDA needs Transformer Engine, which is not installed: docs/transformer_engine.md says how"
        )
    if lacking := faults(importlib.import_module(f"{PACKAGE}.pytorch")):
        raise RunError(
            f"Transformer Engine {importlib.import_module(PACKAGE).__version__} does not fit megatron-core"
            f" {importlib.metadata.version('megatron-core')}: {'; '.join(lacking)}. Install a version that"
            " docs/transformer_engine.md names"
        )


def faults(library: ModuleType) -> list[str]:
    """What `library`, transformer_engine.pytorch, lacks of the operators."""
    found = []
    for name, parameters in OPERATORS:
        operator: Any = library
        for part in name.split("."):
            operator = getattr(operator, part, None)
        if operator is None:
            found.append(f"{name} is missing")
        elif parameters:
            taken = inspect.signature(operator).parameters
            any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
            missing = [parameter for parameter in parameters if parameter not in taken and not any_name]
            found += [f"{name} has no parameter {parameter}" for parameter in missing]
    return found
