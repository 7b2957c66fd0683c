"""The task of the SDPO examples: the quickstart's addition, for a model that has also seen the teacher's contexts.

    python examples/sdpo/task.py [--seed 1]

writes the model and the data to runs/sdpo. Plain problems are demonstrated by somebody careless, who forgets the carry
in two of three sums that need one ("47+85=" -> "122" in place of "132"). A model that has only seen those could make
nothing of a solution or of feedback in its prompt, as a large one can. So half of the demonstrations have the contexts
of `sibling.yaml`, in its own templates, and the right answer after them: a solution to copy, or what was wrong with an
earlier answer. Fine-tuned on both, the model adds badly and reads well: what self-distillation needs.
"""

import argparse
import json
import random
import string
from collections.abc import Iterable
from pathlib import Path

import torch
import yaml
from reward import feedback
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_rl.data.reprompt import Evidence, RepromptOptions, teacher_prompt

HERE = Path(__file__).parent
OUT = Path("runs/sdpo")
OPTIONS = RepromptOptions(**yaml.safe_load((HERE / "sibling.yaml").read_text())["reprompt"])

# Every template in ASCII can be written.
PAD, EOS = "<pad>", "</s>"
VOCABULARY = {token: index for index, token in enumerate([PAD, EOS, *string.printable])}

CARELESS = (True, True, False)  # of the plain demonstrations of a problem, which forget the carry
HELD_OUT = 500


def make_tokenizer(directory: Path) -> None:
    """One token per character; nothing is added by itself."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
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
        max_position_embeddings=128,
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


def wrong_answer(a: int, b: int, generator: random.Random) -> str:
    """Often a carry too few or too many, else a digit that is off by a little."""
    carry = 10 if add(a, b) == add_without_carrying(a, b) else -10
    others = [step * place for step in (-3, -2, -1, 1, 2, 3) for place in (1, 10)]
    off = carry if generator.random() < 0.5 else generator.choice(others)
    return str(abs(a + b + off))


def problem(a: int, b: int, solution: str | None = None, remark: str | None = None) -> dict[str, str]:
    prompt = f"{a}+{b}="
    shown = Evidence(solution=solution, feedback=remark)
    return {"prompt": teacher_prompt(prompt, shown, OPTIONS) if shown else prompt, "answer": add(a, b)}


def in_context(a: int, b: int, generator: random.Random) -> list[dict[str, str]]:
    """The problem with a solution, with feedback, and with both."""
    answer = add(a, b)
    remarks = [feedback(wrong_answer(a, b, generator), answer) for _ in range(2)]
    return [problem(a, b, answer), problem(a, b, None, remarks[0]), problem(a, b, answer, remarks[1])]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(directory: Path, seed: int) -> None:
    """Writes sft.jsonl (demonstrations), train.jsonl and heldout.jsonl (problems; no problem is in both).

    heldout_solution.jsonl, heldout_feedback.jsonl and heldout_both.jsonl are the held-out problems as a teacher sees
    them.
    """
    generator = random.Random(seed)
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    generator.shuffle(every)
    carried = [pair for pair in every if add(*pair) != add_without_carrying(*pair)]
    plain = [pair for pair in every if add(*pair) == add_without_carrying(*pair)]
    problems = carried + plain[: len(carried) // 2]  # two of three need a carry
    generator.shuffle(problems)
    held_out, train = problems[:HELD_OUT], problems[HELD_OUT:]

    demonstrations = []
    for pair in train:
        answers = [add_without_carrying(*pair) if careless else add(*pair) for careless in CARELESS]
        demonstrations += [{**problem(*pair), "response": answer} for answer in answers]
        demonstrations += [{**row, "response": row["answer"]} for row in in_context(*pair, generator)]
    generator.shuffle(demonstrations)
    solution, remark, both = zip(*(in_context(*pair, generator) for pair in held_out))
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "sft.jsonl", demonstrations)
    _write(directory / "train.jsonl", (problem(*pair) for pair in train))
    _write(directory / "heldout.jsonl", (problem(*pair) for pair in held_out))
    _write(directory / "heldout_solution.jsonl", solution)
    _write(directory / "heldout_feedback.jsonl", remark)
    _write(directory / "heldout_both.jsonl", both)


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
