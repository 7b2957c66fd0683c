"""The reward of tools/bench_vs_trl.py, on both sides: 1 where an answer's first word has an odd number."""

from typing import Any


def odd_word(text: str) -> float:
    """Words are w3, w4, ...; 0 for an answer without any."""
    words = text.split()
    return float(int(words[0][1:]) % 2) if words else 0.0


def judge(prompt: Any, rollout: Any) -> float:
    return odd_word(rollout.text)
