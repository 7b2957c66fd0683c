"""The conversion of SmolLM2 from GGUF: rows in their place, and a tokenizer that splits as the model's own does."""

import importlib.util
import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

TOOL = Path(__file__).parents[2] / "tools" / "smollm2.py"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smollm2_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields(vocabulary: list[str], merges: list[str]) -> dict[str, object]:
    """A GGUF file's fields, of a Llama with 3 heads of 8 over 1 key-value head."""
    return {
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 24,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 3,
        "llama.attention.head_count_kv": 1,
        "llama.rope.freq_base": 1e5,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.vocab_size": len(vocabulary),
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * len(CONTROL) + [1] * (len(vocabulary) - len(CONTROL)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


@pytest.fixture(scope="module")
def content() -> dict[str, object]:
    # "12" and "ĠĠ" are merges: a digit never joins another, spaces do.
    merges = ["h i", "Ġ Ġ", "1 2", "Ġ hi"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return fields([*CONTROL, *letters, *(merge.replace(" ", "") for merge in merges)], merges)


def as_in_gguf(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Row i + d/2 of a head goes behind row i, one row at a time."""
    half = weight.shape[0] // heads // 2
    rows = [weight[h * 2 * half + i + offset] for h in range(heads) for i in range(half) for offset in (0, half)]
    return torch.stack(rows)


def test_rows_of_a_head_come_back_into_order(tool: ModuleType) -> None:
    # Two heads of four rows; llama.cpp has the rows of a pair side by side.
    rows = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])[:, None]
    assert tool.unpermute(rows, 2).flatten().tolist() == list(range(8))


def test_a_converted_model_answers_as_the_one_it_was_made_from(
    tool: ModuleType, content: dict[str, object], tmp_path: Path
) -> None:
    config = tool.llama_config(content)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config.to_diff_dict()))
    names = {**{hf: f"blk.{{}}.{name}" for name, hf in tool.LAYER.items()}, **{v: k for k, v in tool.OUTSIDE.items()}}
    tensors = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = name.split(".")[2] if ".layers." in name else ""
        part = name.removeprefix(f"model.layers.{layer}.").rpartition(".")[0]
        heads = {"self_attn.q_proj": 3, "self_attn.k_proj": 1}.get(part)
        tensors[f"{names[part].format(layer)}.weight"] = as_in_gguf(weight, heads) if heads else weight
    tool.convert(tool.Gguf(content, tensors), tmp_path)

    ids = torch.arange(20)[None]
    written = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(written(ids).logits, model(ids).logits)
    assert (config.rms_norm_eps, config.head_dim, config.rope_parameters["rope_theta"]) == (1e-5, 8, 1e5)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.tokenize("hi hi12   3<|im_end|>") == ["hi", "Ġhi", "1", "2", "ĠĠ", "Ġ", "3", "<|im_end|>"]
    for text in ("Ünïcode  12 + 3 = 15.\n\nhi", " it 's", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_another_way_of_splitting_is_refused(tool: ModuleType, content: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'qwen2'"):
        tool.convert(tool.Gguf({**content, "tokenizer.ggml.pre": "qwen2"}, {}), tmp_path)


@pytest.mark.full
@pytest.mark.skipif("SMOLLM2" not in os.environ, reason="set SMOLLM2 to the directory that tools/smollm2.py made")
def test_the_real_model_knows_english_and_only_with_its_rows_in_order(tool: ModuleType) -> None:
    path = os.environ["SMOLLM2"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    text = (
        "The capital of France is Paris, and the capital of Germany is Berlin. Water boils at one hundred degrees "
        "Celsius at sea level, and freezes at zero."
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        in_order = model(ids, labels=ids).loss.exp().item()
        for layer in model.model.layers:
            for part, heads in ((layer.self_attn.q_proj, 9), (layer.self_attn.k_proj, 3)):
                part.weight.copy_(as_in_gguf(part.weight, heads))
        as_stored = model(ids, labels=ids).loss.exp().item()
    assert in_order < 15 < 30 < as_stored, (in_order, as_stored)
    answer = model.generate(torch.tensor([tokenizer("The capital of France is")["input_ids"]]), max_new_tokens=1)
    assert tokenizer.decode(answer[0, -1]) == " Paris"
