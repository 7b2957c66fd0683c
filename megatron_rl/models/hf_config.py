"""What a Hugging Face config says about a model's shape, checked against what the families here can do."""

import hashlib
import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.models.families import FAMILIES, Family

# What a number in config.json may be at most; more is a slip, and transformers would work on it for minutes.
LARGEST = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**13,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**40,
    "num_labels": 2**16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers that make a model. `inv_freq` [head_dim / 2] float32 holds the rotary frequencies.

    A `scalar` model has one value per token in place of logits.
    """

    family: Family
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    tied: bool
    inv_freq: torch.Tensor
    scalar: bool = False

    def as_scalar(self) -> "ModelShape":
        """The same body under a scalar head of its own."""
        return replace(self, scalar=True, tied=False)

    def identity(self) -> dict[str, Any]:
        """The shape as JSON: two models with the same identity hold the same tensors in the same places."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        rotary = hashlib.sha256(self.inv_freq.numpy().tobytes()).hexdigest()[:16]
        return plain | {"family": self.family.name, "inv_freq": rotary}


def rope_frequencies(hf: Any, head_dim: int) -> torch.Tensor:
    """theta^(-2i/d) (Su et al., 2021), or llama3's stretched form as `transformers` defines it.

    transformers 5 reads `rope_theta`/`rope_scaling` and `rope_parameters` alike into `rope_parameters`.
    """
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return 1.0 / (rope["rope_theta"] ** exponent)
    if kind == "llama3":
        inv_freq, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
        return inv_freq
    raise ValueError(f"rope_type={kind!r} is not supported; the model's config must use 'default' or 'llama3'")


def _refuse_variants(hf: Any) -> None:
    """Options of these families that change the mathematics and are not built here."""
    if getattr(hf, "hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act={hf.hidden_act!r} is not supported; SwiGLU models (hidden_act='silu') are")
    for name in ("use_sliding_window", "mlp_bias", "attention_bias"):
        if getattr(hf, name, False) and not (name == "attention_bias" and hf.model_type == "qwen2"):
            raise ValueError(f"{name}=true in the model's config is not supported for model_type={hf.model_type!r}")
    windowed = sorted(set(getattr(hf, "layer_types", None) or ()) - {"full_attention"})
    if windowed:
        raise ValueError(f"layer_types in the model's config has {windowed[0]!r}; only 'full_attention' is supported")


def _check_family(model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"model_type={model_type!r} is not supported; the families are {', '.join(sorted(FAMILIES))}")


def model_shape(hf: Any) -> ModelShape:
    """Reads a `transformers` config; refuses what would be computed wrongly."""
    _check_family(hf.model_type)
    _refuse_variants(hf)
    # Some families set head_dim apart from hidden_size / heads, so it is read first and derived second.
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    inv_freq = rope_frequencies(hf, head_dim)
    if head_dim % 2 or hf.num_attention_heads % hf.num_key_value_heads or not 0 < hf.rms_norm_eps < 1:
        raise ValueError(
            f"head_dim={head_dim} must be even, num_key_value_heads={hf.num_key_value_heads} divide "
            f"num_attention_heads={hf.num_attention_heads}, and rms_norm_eps={hf.rms_norm_eps} lie between 0 and 1"
        )
    if not torch.isfinite(inv_freq).all():
        raise ValueError(f"rope_parameters={hf.rope_parameters} in the model's config give no finite frequencies")
    return ModelShape(
        family=FAMILIES[hf.model_type],
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        tied=bool(hf.tie_word_embeddings),
        inv_freq=inv_freq,
    )


def load_config(path: str | Path) -> Any:
    """The `transformers` config in the directory `path`. Python code that comes with a model is never run."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={str(path)!r} has no config.json: give a Hugging Face model directory")
    _check_file(file)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # transformers passes on whatever a wrong value made happen
        raise ValueError(f"{file} is not a model's config: {type(error).__name__}: {error}") from error


def _check_file(file: Path) -> None:
    """Refuses what transformers would run, walk into without end, or say nothing of."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(held).__name__}")
    if held.get("auto_map"):
        raise ValueError(
            f"{file} names Python code of the model's own (auto_map), which is never run: use a model whose class is "
            f"in transformers; the families are {', '.join(sorted(FAMILIES))}"
        )
    if held.get("quantization_config"):
        raise ValueError(f"{file} has a quantization_config: training needs weights in floating point")
    _check_family(held.get("model_type"))
    for name, largest in LARGEST.items():
        value = held.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            raise ValueError(f"{file} has {name}={value!r}: it must be a whole number from 1 to {largest}")


def load_shape(path: str | Path) -> ModelShape:
    """The shape of the model in the Hugging Face directory `path`."""
    hf = load_config(path)
    try:
        return model_shape(hf)
    except (TypeError, ArithmeticError, LookupError, RuntimeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{Path(path) / 'config.json'} does not describe a model: {reason}") from error


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in `path` as transformers builds it, tied ones once; no memory is taken."""
    hf = load_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf, trust_remote_code=False)
    except Exception as error:  # the same
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{Path(path) / 'config.json'} does not describe a model: {reason}") from error
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def num_parameters(path: str | Path) -> int:
    """Parameters of the model in `path`; tied ones count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(path).values())


def check_layout(shape: ModelShape, *, tp: int, pp: int, vpp: int) -> None:
    """Refuses layouts that do not divide the model, in the terms of the config."""
    for name, count in (("attention heads", shape.num_heads), ("key/value heads", shape.num_kv_heads)):
        if count % tp:
            raise ValueError(f"parallel.tp={tp} does not divide the model's {count} {name}")
    if shape.ffn_hidden_size % tp:
        raise ValueError(f"parallel.tp={tp} does not divide the model's MLP size {shape.ffn_hidden_size}")
    if vpp > 1 and shape.num_layers % (pp * vpp):
        raise ValueError(
            f"parallel.pp={pp} with parallel.vpp={vpp} makes {pp * vpp} stages, which do not divide the model's "
            f"{shape.num_layers} layers"
        )
    if layers_on_last_stage(shape.num_layers, pp) < 1:
        raise ValueError(f"parallel.pp={pp} leaves a stage without one of the model's {shape.num_layers} layers")


def layers_on_last_stage(num_layers: int, pp: int) -> int:
    """Where stages do not divide the layers the last has fewer than the rest: it holds the vocabulary too."""
    return num_layers - (pp - 1) * -(-num_layers // pp)
