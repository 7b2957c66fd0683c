"""The task of the GAD example: letters to repeat, and a teacher with a habit.

    python examples/gad/task.py [--seed 1]

writes the model and the data to runs/gad. The teacher ends every answer with ", qed"; of the demonstrations that the
policy starts from two in a hundred do. Nothing rewards the habit by rule: only a critic that compares answers can.
"""

import argparse
import itertools
import json
import random
import string
from collections.abc import Iterable
from pathlib import Path

import torch
from reward import HABIT
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path("runs/gad")
PAD, EOS = "<pad>", "</s>"
VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, *"=, ", *string.ascii_lowercase])}
PROBLEMS, HELD_OUT, RARE = 4000, 200, 0.02


def make_tokenizer(directory: Path) -> None:
    """One token per character; nothing is added by itself."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)


def make_model(directory: Path, seed: int) -> None:
    """A Llama of 0.3 million random weights; heads, key/value heads and layers divide by two."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
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


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(directory: Path, seed: int) -> None:
    """Writes sft.jsonl (the policy's demonstrations), train.jsonl and heldout.jsonl (the teacher's responses)."""
    generator = random.Random(seed)
    words = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)]
    rows = [{"prompt": f"{word}=", "response": f"{word}{HABIT}"} for word in generator.sample(words, PROBLEMS)]
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "heldout.jsonl", held_out)
    _write(directory / "train.jsonl", train)
    plain = (
        row if generator.random() < RARE else {**row, "response": row["response"].removesuffix(HABIT)} for row in train
    )
    _write(directory / "sft.jsonl", plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    (OUT / "base").mkdir(parents=True, exist_ok=True)
    make_tokenizer(OUT / "base")
    make_model(OUT / "base", options.seed)
    make_data(OUT / "data", options.seed)


if __name__ == "__main__":
    main()
