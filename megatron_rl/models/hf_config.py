"""What a Hugging Face config says about a model's shape, checked against what the families here can do."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_rl.config.schema import ParallelConfig
from megatron_rl.models.families import FAMILIES, Family

# What a number in config.json may be at most; more is a slip, and transformers would work on it for minutes.
LARGEST = {
    "num_hidden_layers": 2**10,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**13,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "num_experts_per_tok": 2**10,
    "moe_intermediate_size": 2**22,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**40,
    "num_labels": 2**16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture in place of every layer's MLP: a router weighs the `top_k` likeliest of `num_experts` SwiGLU MLPs.

    With `norm_topk` the chosen weights sum to one; without, they are what the softmax over all experts gave.
    """

    num_experts: int
    top_k: int
    ffn_hidden_size: int
    norm_topk: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The numbers that make a model. `inv_freq` [head_dim / 2] float32 holds the rotary frequencies.

    A `scalar` model has one value per token in place of logits. `ffn_hidden_size` is that of a dense MLP; a model with
    `experts` has none.
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
    experts: Experts | None = None
    scalar: bool = False

    def as_scalar(self) -> "ModelShape":
        """The same body under a scalar head of its own."""
        return replace(self, scalar=True, tied=False)

    def identity(self) -> dict[str, Any]:
        """The shape as JSON: two models with the same identity hold the same tensors in the same places."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        rotary = hashlib.sha256(self.inv_freq.numpy().tobytes()).hexdigest()[:16]
        experts = None if self.experts is None else asdict(self.experts)
        return plain | {"family": self.family.name, "inv_freq": rotary, "experts": experts}


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
    if hf.model_type == "mixtral" and hf.sliding_window is not None:
        raise ValueError(f"sliding_window={hf.sliding_window} in the model's config is not supported; null is")
    if getattr(hf, "router_jitter_noise", 0.0):
        raise ValueError(f"router_jitter_noise={hf.router_jitter_noise} in the model's config is not supported; 0 is")
    if getattr(hf, "mlp_only_layers", None) or getattr(hf, "decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"mlp_only_layers={hf.mlp_only_layers} with decoder_sparse_step={hf.decoder_sparse_step} in the model's "
            "config mixes layers with and without experts, which is not supported; [] with 1 is"
        )
    windowed = sorted(set(getattr(hf, "layer_types", None) or ()) - {"full_attention"})
    if windowed:
        raise ValueError(f"layer_types in the model's config has {windowed[0]!r}; only 'full_attention' is supported")


def _experts(hf: Any) -> Experts | None:
    """The mixture that a config describes, if it does. Mixtral always normalises what its router chose."""
    if FAMILIES[hf.model_type].mixture is None:
        return None
    count = hf.num_local_experts if hf.model_type == "mixtral" else hf.num_experts
    if not 1 <= hf.num_experts_per_tok <= count:
        raise ValueError(
            f"num_experts_per_tok={hf.num_experts_per_tok} in the model's config must be from 1 to the number of "
            f"experts, {count}"
        )
    return Experts(
        num_experts=count,
        top_k=hf.num_experts_per_tok,
        ffn_hidden_size=getattr(hf, "moe_intermediate_size", hf.intermediate_size),
        norm_topk=getattr(hf, "norm_topk_prob", True),
    )


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
        experts=_experts(hf),
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
    """Every tensor of the model in `path` as transformers writes it, tied ones once; no memory is taken."""
    hf = load_config(path)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf, trust_remote_code=False)
    except Exception as error:  # the same
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{Path(path) / 'config.json'} does not describe a model: {reason}") from error
    return {name: tuple(tensor.shape) for name, tensor in named_weights(model, dict(model.named_parameters())).items()}


def named_weights(model: Any, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of a `transformers` model under the names of its files: views of them, in the files' shapes.

    transformers 5 keeps all experts of a layer in two tensors, [E, 2 F, H] and [E, H, F], which its files hold one by
    one; what it makes of one for the other are copies.
    """
    mixture = FAMILIES[model.config.model_type].mixture
    if mixture is None:
        return parameters
    found: dict[str, torch.Tensor] = {}
    for name, tensor in parameters.items():
        layer, _, part = name.partition(".mlp.")
        experts = f"{layer}.{mixture.block}.experts"
        if part == "experts.gate_up_proj":
            for expert, (gate, up) in enumerate(one.chunk(2) for one in tensor.detach()):
                found[f"{experts}.{expert}.{mixture.gate}.weight"] = gate
                found[f"{experts}.{expert}.{mixture.up}.weight"] = up
        elif part == "experts.down_proj":
            found |= {f"{experts}.{e}.{mixture.down}.weight": one for e, one in enumerate(tensor.detach())}
        else:
            found[f"{layer}.{mixture.block}.{part}" if part else name] = tensor
    return found


def classifier_config(path: str | Path) -> dict[str, Any]:
    """What a critic's config.json says otherwise than that of `path`: it is a sequence classifier with one label."""
    names = load_config(path).architectures or []
    return {
        "architectures": [name.replace("ForCausalLM", "ForSequenceClassification") for name in names],
        "id2label": {"0": "value"},
        "label2id": {"value": 0},
    }


def num_parameters(path: str | Path) -> int:
    """Parameters of the model in `path`; tied ones count once."""
    return sum(math.prod(shape) for shape in tensor_shapes(path).values())


def check_layout(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuses layouts that do not divide the model, in the terms of the config."""
    tp, pp, vpp, ep, etp = parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.etp
    for name, count in (("attention heads", shape.num_heads), ("key/value heads", shape.num_kv_heads)):
        if count % tp:
            raise ValueError(f"parallel.tp={tp} does not divide the model's {count} {name}")
    if shape.experts is not None:
        _check_experts_layout(shape.experts, parallel)
    elif ep > 1 or etp > 1:
        raise ValueError(f"parallel.ep={ep}, parallel.etp={etp}: the model has no experts to share out; both must be 1")
    elif shape.ffn_hidden_size % tp:
        raise ValueError(f"parallel.tp={tp} does not divide the model's MLP size {shape.ffn_hidden_size}")
    if vpp > 1 and shape.num_layers % (pp * vpp):
        raise ValueError(
            f"parallel.pp={pp} with parallel.vpp={vpp} makes {pp * vpp} stages, which do not divide the model's "
            f"{shape.num_layers} layers"
        )
    if layers_on_last_stage(shape.num_layers, pp) < 1:
        raise ValueError(f"parallel.pp={pp} leaves a stage without one of the model's {shape.num_layers} layers")


def _check_experts_layout(experts: Experts, parallel: ParallelConfig) -> None:
    if experts.num_experts % parallel.ep:
        raise ValueError(f"parallel.ep={parallel.ep} does not divide the model's {experts.num_experts} experts")
    if experts.ffn_hidden_size % parallel.etp:
        size = experts.ffn_hidden_size
        raise ValueError(f"parallel.etp={parallel.etp} does not divide the experts' MLP size {size}")
    if parallel.tp > 1 and not parallel.sequence_parallel:
        raise ValueError(
            f"parallel.tp={parallel.tp} in a model with experts needs parallel.sequence_parallel=true: without it "
            "every tensor-parallel rank would send the same tokens to the experts"
        )


def layers_on_last_stage(num_layers: int, pp: int) -> int:
    """Where stages do not divide the layers the last has fewer than the rest: it holds the vocabulary too."""
    return num_layers - (pp - 1) * -(-num_layers // pp)
