"""What a Hugging Face config says about a model's shape, checked against what the families here can do."""

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.models.families import FAMILIES, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers that make a model. `inv_freq` [head_dim / 2] float32 holds the rotary frequencies."""

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


def model_shape(hf: Any) -> ModelShape:
    """Reads a `transformers` config; refuses what would be computed wrongly."""
    if hf.model_type not in FAMILIES:
        raise ValueError(
            f"model_type={hf.model_type!r} is not supported; the families are {', '.join(sorted(FAMILIES))}"
        )
    _refuse_variants(hf)
    # Some families set head_dim apart from hidden_size / heads, so it is read first and derived second.
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
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
        inv_freq=rope_frequencies(hf, head_dim),
    )


def load_shape(path: str | Path) -> ModelShape:
    """The shape of the model in the Hugging Face directory `path`."""
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"model.path={str(path)!r} has no config.json: give a Hugging Face model directory")
    return model_shape(AutoConfig.from_pretrained(path))


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model in `path` as transformers builds it, tied ones once; no memory is taken."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
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
