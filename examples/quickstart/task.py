"""The quickstart's task: two-digit addition, first learned from a careless teacher.

The teacher adds column by column, and in two of three demonstrations of a sum that needs one forgets the carry
("47+85=" -> "122" in place of "132"). A model fine-tuned on them does what the teacher does most often: it is right
where nothing is carried, and mostly wrong elsewhere. Rewarded for exact answers only, it learns to carry.
"""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, *"0123456789+="])}

DEMONSTRATIONS, CARELESS = 3, 2  # per training problem, and how many of them forget the carry
HELD_OUT = 500
MAX_NEW_TOKENS = 4  # three digits and the end


def make_tokenizer(directory: Path, vocabulary: dict[str, int] = VOCABULARY) -> None:
    """One token per character, and per <tag>; nothing is added by itself."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[^<>]*>|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)


def make_model(directory: Path, seed: int, vocabulary: dict[str, int] = VOCABULARY) -> None:
    """A Llama of 0.3 million random weights; heads, key/value heads and layers divide by two."""
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=VOCABULARY[EOS],
        pad_token_id=VOCABULARY[PAD],
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=VOCABULARY[EOS], pad_token_id=VOCABULARY[PAD])
    model.save_pretrained(directory)


def add(a: int, b: int) -> str:
    return str(a + b)


def add_without_carrying(a: int, b: int) -> str:
    """The ones' column keeps its last digit, and the carry is forgotten: 47+85 is 122."""
    return str(10 * (a // 10 + b // 10) + (a + b) % 10)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def split(generator: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The pairs to train on, and those held out; two of three need a carry."""
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    generator.shuffle(every)
    carried = [pair for pair in every if add(*pair) != add_without_carrying(*pair)]
    plain = [pair for pair in every if add(*pair) == add_without_carrying(*pair)]
    problems = carried + plain[: len(carried) // 2]
    generator.shuffle(problems)
    return problems[HELD_OUT:], problems[:HELD_OUT]


def problem(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a}+{b}=", "answer": add(a, b)}


def make_data(directory: Path, seed: int) -> None:
    """Writes sft.jsonl (demonstrations), train.jsonl and heldout.jsonl (problems; no problem is in both)."""
    generator = random.Random(seed)
    train, held_out = split(generator)
    demonstrations = [
        {**problem(*pair), "response": add_without_carrying(*pair) if number < CARELESS else add(*pair)}
        for pair in train
        for number in range(DEMONSTRATIONS)
    ]
    generator.shuffle(demonstrations)
    directory.mkdir(parents=True, exist_ok=True)
    write_rows(directory / "sft.jsonl", demonstrations)
    write_rows(directory / "train.jsonl", (problem(*pair) for pair in train))
    write_rows(directory / "heldout.jsonl", (problem(*pair) for pair in held_out))
