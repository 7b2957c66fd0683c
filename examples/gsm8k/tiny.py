"""Word problems in the form of GSM8K for a tiny model, which learns them in minutes on two cores.

    python examples/gsm8k/tiny.py [--seed 1]

writes a model and data to runs/gsm8k_tiny. A problem is a short story around two numbers to add. A solution has the
form of the r1_zero template: the reasoning, which the prompt has opened, adds the ones and the tens, and the answer is
tagged: " 7+8=15 4+3=7 </think> <answer>85</answer>". In five of six demonstrations of a problem that needs a carry it
is forgotten, and the answer is 75. A model fine-tuned on them reads every story, reasons well and answers badly.
"""

import argparse
import itertools
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUT = Path("runs/gsm8k_tiny")
TEMPLATE = (Path(__file__).parent / "tiny_template.txt").read_text()

NAMES = ("Ann", "Ben", "Eve", "Tom")
THINGS = ("figs", "nuts", "eggs", "plums")
STORIES = (
    "{name} has {a} {things} and buys {b} more. How many {things} has {name} now?",
    "{name} finds {a} {things} and {other} finds {b}. How many {things} is that?",
    "{name} ate {a} {things} and has {b} left. How many {things} were there?",
    "There are {a} {things} here and {b} there. How many {things} are there?",
)

PAD, EOS = "<pad>", "</s>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# A token is a tag, a word with the space before it, or one character.
TOKEN = rf"{'|'.join(TAGS)}| ?[A-Za-z]+|[\s\S]"

PROBLEMS, HELD_OUT = 4000, 300
DEMONSTRATIONS, CARELESS = 6, 5  # per training problem, and how many of them forget the carry


@dataclass(frozen=True)
class Problem:
    """Two numbers of two digits, and a story around them."""

    a: int
    b: int
    question: str

    @property
    def ones(self) -> int:
        return self.a % 10 + self.b % 10

    @property
    def tens(self) -> int:
        return self.a // 10 + self.b // 10

    @property
    def result(self) -> int:
        return self.a + self.b

    @property
    def careless(self) -> int:
        """What comes of forgetting the carry: 47 and 38 are 75."""
        return 10 * self.tens + self.ones % 10

    def reasoning(self) -> str:
        a, b = self.a, self.b
        return f"{a % 10}+{b % 10}={self.ones} {a // 10}+{b // 10}={self.tens}"

    def row(self) -> dict[str, str]:
        return {"question": self.question, "answer": f"{self.reasoning()}\n#### {self.result}"}

    def response(self, answer: int) -> str:
        """What follows the prompt's <think>."""
        return f" {self.reasoning()} </think> <answer>{answer}</answer>"


def vocabulary() -> dict[str, int]:
    """Every token of the template, the stories and the solutions, and its id."""
    words = re.sub(r"\{\w+\}", "", " ".join([TEMPLATE, *STORIES])) + " ".join(["", *NAMES, *THINGS])
    tokens = {*TAGS, *"0123456789+=", *re.findall(TOKEN, words)}
    return {token: index for index, token in enumerate([PAD, EOS, *sorted(tokens)])}


def make_tokenizer(directory: Path) -> None:
    """Decoding gives the text back to the letter; nothing is added by itself."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(directory)


def make_model(directory: Path, seed: int) -> None:
    """A Llama of 0.3 million random weights; heads, key/value heads and layers divide by two."""
    tokens = vocabulary()
    config = LlamaConfig(
        vocab_size=len(tokens) + len(tokens) % 2,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokens[EOS],
        pad_token_id=tokens[PAD],
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokens[EOS], pad_token_id=tokens[PAD])
    model.save_pretrained(directory)


def make_problems(generator: random.Random) -> list[Problem]:
    """PROBLEMS stories around pairs of numbers that are all different; two of three need a carry."""
    every = []
    for a, b in itertools.product(range(10, 100), repeat=2):
        name, other = generator.sample(NAMES, 2)
        words = {"name": name, "other": other, "things": generator.choice(THINGS)}
        every.append(Problem(a, b, generator.choice(STORIES).format(a=a, b=b, **words)))
    generator.shuffle(every)
    carried = [problem for problem in every if problem.careless != problem.result]
    plain = [problem for problem in every if problem.careless == problem.result]
    with_carry = PROBLEMS * 2 // 3
    problems = carried[:with_carry] + plain[: PROBLEMS - with_carry]
    generator.shuffle(problems)
    return problems


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(directory: Path, seed: int) -> None:
    """Writes sft.jsonl (demonstrations), train.jsonl and heldout.jsonl (problems; no pair of numbers is in both)."""
    generator = random.Random(seed)
    problems = make_problems(generator)
    held_out, train = problems[:HELD_OUT], problems[HELD_OUT:]
    demonstrations = [
        {**problem.row(), "response": problem.response(problem.careless if number < CARELESS else problem.result)}
        for problem in train
        for number in range(DEMONSTRATIONS)
    ]
    generator.shuffle(demonstrations)
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "sft.jsonl", demonstrations)
    _write(directory / "train.jsonl", (problem.row() for problem in train))
    _write(directory / "heldout.jsonl", (problem.row() for problem in held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    (OUT / "base").mkdir(parents=True, exist_ok=True)
    make_tokenizer(OUT / "base")
    make_model(OUT / "base", options.seed)
    make_data(OUT / "data", options.seed)
    print(
        f"{OUT / 'base'}: a model and its tokenizer\n{OUT / 'data'}: {PROBLEMS} problems, {HELD_OUT} of them held out"
    )


if __name__ == "__main__":
    main()
