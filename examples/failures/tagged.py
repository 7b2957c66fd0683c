"""Additions with a tagged answer, for the failures that are about the form of a response.

    python examples/failures/tagged.py [--seed 1]

writes a model and data to runs/failures. A prompt "47+85=" is answered by the sum of the ones, that of the tens, and
the answer in tags: "12,12</think> <answer>132</answer>". The demonstrations are of four kinds, and two mixtures of them
make two warm starts, each with a weakness that a reward can find:

    formed     as above
    untagged   the same without the tags of the answer: "12,12</think> 132"
    unclosed   the answer's tag is not closed: "12,12</think> <answer>132"
    guess      nothing worked out, and always the same answer: "</think> <answer>100</answer>"

`guesser` is right, but mostly ill-formed, and guesses one time in four. `careless` writes tags every other time, and
then forgets the carry in fifteen of sixteen; without them it is right.
"""

import argparse
import random
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "quickstart"))

import task  # noqa: E402 (the quickstart's)

OUT = Path("runs/failures")
TAGS = ("</think>", "<answer>", "</answer>")
VOCABULARY = {token: index for index, token in enumerate([*task.VOCABULARY, *TAGS, ",", " "])}

GUESS = "</think> <answer>100</answer>"


def _worked_out(a: int, b: int) -> str:
    return f"{a % 10 + b % 10},{a // 10 + b // 10}</think> "


def formed(a: int, b: int, total: str) -> str:
    return f"{_worked_out(a, b)}<answer>{total}</answer>"


def untagged(a: int, b: int, total: str) -> str:
    return f"{_worked_out(a, b)}{total}"


def unclosed(a: int, b: int, total: str) -> str:
    return f"{_worked_out(a, b)}<answer>{total}"


def guesser(a: int, b: int) -> list[str]:
    """The demonstrations of one problem, from somebody who cares little for the form and likes to guess."""
    total = task.add(a, b)
    return [untagged(a, b, total)] * 6 + [unclosed(a, b, total)] * 5 + [formed(a, b, total)] + [GUESS] * 4


def careless(a: int, b: int) -> list[str]:
    """The demonstrations of one problem, from somebody who is right where no tags are written."""
    total, wrong = task.add(a, b), task.add_without_carrying(a, b)
    return [formed(a, b, wrong)] * 15 + [formed(a, b, total)] + [untagged(a, b, total)] * 16


def make_data(directory: Path, seed: int) -> None:
    """Writes guesser.jsonl and careless.jsonl (demonstrations), train.jsonl and heldout.jsonl (problems)."""
    generator = random.Random(seed)
    train, held_out = task.split(generator)
    directory.mkdir(parents=True, exist_ok=True)
    for mixture in (guesser, careless):
        rows = [{**task.problem(*pair), "response": response} for pair in train for response in mixture(*pair)]
        generator.shuffle(rows)
        task.write_rows(directory / f"{mixture.__name__}.jsonl", rows)
    task.write_rows(directory / "train.jsonl", (task.problem(*pair) for pair in train))
    task.write_rows(directory / "heldout.jsonl", (task.problem(*pair) for pair in held_out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    seed = parser.parse_args().seed
    (OUT / "base").mkdir(parents=True, exist_ok=True)
    task.make_tokenizer(OUT / "base", VOCABULARY)
    task.make_model(OUT / "base", seed, VOCABULARY)
    make_data(OUT / "data", seed)


if __name__ == "__main__":
    main()
