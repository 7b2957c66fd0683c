"""Llamas of random weights in a few sizes, for measurements."""

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "1m": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 352, "vocab_size": 2048},
    "8m": {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704, "vocab_size": 4096},
    "50m": {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408, "vocab_size": 8192},
    "150m": {"hidden_size": 768, "num_hidden_layers": 18, "intermediate_size": 2048, "vocab_size": 16384},
}


def make_llama(folder: Path, size: str, dtype: torch.dtype = torch.float32, *, mean_answer: int = 0) -> Any:
    """A `LlamaForCausalLM`, written to `folder` with a tokenizer of one word per id.

    With `mean_answer` one in so many ids ends an answer, so that lengths are about geometric with this mean.
    """
    # Imported late: not every measurement needs a model.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    vocabulary = SIZES[size]["vocab_size"]
    ends = list(range(0, vocabulary, mean_answer)) if mean_answer else [0]
    config = LlamaConfig(
        **SIZES[size],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0").save_pretrained(folder)
    return model


def dense_parameters(model: Any) -> int:
    """All but the input embedding, which is a look-up."""
    return sum(parameter.numel() for parameter in model.parameters()) - model.get_input_embeddings().weight.numel()
