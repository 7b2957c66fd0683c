"""The real GSM8K, as the trainers read it: train.jsonl and test.jsonl with a question, an answer and a response.

    python examples/gsm8k/prepare.py                                      from the hub, 2 MB
    python examples/gsm8k/prepare.py --train train.jsonl --test test.jsonl   from files that are there (or .parquet)

The answer is the final number. The response is the solution as it follows the r1_zero template, whose prompt has
opened the reasoning: " ... </think> <answer>72</answer>".
"""

import argparse
import json
import re
from pathlib import Path

from megatron_rl.data.sources import load_rows

REPOSITORY = "openai/gsm8k"
FILES = {"train": "main/train-00000-of-00001.parquet", "test": "main/test-00000-of-00001.parquet"}
# Results of a calculator stand in the solutions, as in "48/2 = <<48/2=24>>24 clips".
ANNOTATION = re.compile(r"<<[^<>]*>>")
MARK = "####"


def download(split: str) -> Path:
    """The split's file, from the hub or from where an earlier download lies."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(REPOSITORY, FILES[split], repo_type="dataset"))


def convert(question: str, solution: str) -> dict[str, str]:
    """One row. ValueError where the solution does not end in a marked number."""
    reasoning, mark, number = solution.rpartition(MARK)
    answer = number.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?\d+(\.\d+)?", answer):
        raise ValueError(f"the solution {solution!r} does not end in {MARK} and a number")
    reasoning = ANNOTATION.sub("", reasoning).strip()
    return {
        "question": question.strip(),
        "answer": answer,
        "response": f" {reasoning} </think> <answer>{answer}</answer>",
    }


def prepare(source: Path, target: Path) -> int:
    """Converts a file with the fields `question` and `answer`, and says how many rows there were."""
    rows = load_rows(source)
    lines = [json.dumps(convert(rows[place]["question"], rows[place]["answer"])) for place in range(len(rows))]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="a file to convert in place of the hub's")
    parser.add_argument("--test", type=Path, help="the same, of the held-out problems")
    parser.add_argument("--out", type=Path, default=Path("data/gsm8k"))
    options = parser.parse_args()
    for split in FILES:
        target = options.out / f"{split}.jsonl"
        rows = prepare(getattr(options, split) or download(split), target)
        print(f"{target}: {rows} rows")


if __name__ == "__main__":
    main()
