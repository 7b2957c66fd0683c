"""The models that tools/bench_vs_trl.py trains: random Llamas whose answers end by chance, or never."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "1m": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 352, "vocab_size": 2048},
    "8m": {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "vocab_size": 4096},
    "50m": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "vocab_size": 8192},
    "wide": {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 704, "vocab_size": 151936},
}
PROMPT_TOKENS, MEAN = 32, 64
SPECIAL = {"<end>": 0, "<pad>": 1, "<other>": 2}


def make_model(folder: Path, size: str, *, ends: bool) -> None:
    """Model, tokenizer and prompts.jsonl. Words are w3, w4, and so on.

    Where nothing may end, unit 0 of every token's embedding is a constant to which no layer adds, and that of the end's
    output row is far below zero: so is the end's logit.
    """
    torch.manual_seed(0)
    shape = SHAPES[size]
    heads, vocabulary = shape["hidden_size"] // 64, shape["vocab_size"]
    stop = list(range(0, vocabulary, MEAN)) if ends else [SPECIAL["<end>"]]
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=1024,
        tie_word_embeddings=size == "wide",
        bos_token_id=None,
        eos_token_id=SPECIAL["<end>"],
        pad_token_id=SPECIAL["<pad>"],
    )
    model = LlamaForCausalLM(config)
    if not ends:
        with torch.no_grad():
            model.get_input_embeddings().weight[:, 0] = 0.5
            model.get_output_embeddings().weight[:, 0] = 0.5
            model.get_output_embeddings().weight[SPECIAL["<end>"], 0] = -40.0
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
    model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=SPECIAL["<pad>"])
    model.save_pretrained(folder)
    words = {**SPECIAL, **{f"w{i}": i for i in range(len(SPECIAL), vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>", unk_token="<other>"
    ).save_pretrained(folder)
    drawn = torch.randint(len(SPECIAL), vocabulary, (64, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
    rows = [{"prompt": " ".join(f"w{i}" for i in ids)} for ids in drawn.tolist()]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
