"""Stop texts: a response ends at the first token after which its decoded text holds one."""

import random
from collections.abc import Sequence

import pytest
import torch

# Bytes, as a byte-level tokenizer has them: a character may be cut in two, a text may end inside a token.
VOCABULARY = [b"a", b"b", b"</", b"</a", b">", b"a>", b">\n", b"a>b", b"\xc3", b"\xa9", b"", b"\xe2\x82", b"\xac</"]
EOS = len(VOCABULARY)


def decode(tokens: Sequence[int]) -> str:
    """What a tokenizer does: no end token, no lone half of a character, no space in front."""
    return b"".join(VOCABULARY[t] for t in tokens if t != EOS).decode("utf-8", errors="replace").lstrip(" ")


def expected_end(tokens: Sequence[int], texts: Sequence[str]) -> int | None:
    for count in range(1, len(tokens) + 1):
        if tokens[count - 1] == EOS:
            return None
        if any(text in decode(tokens[:count]) for text in texts):
            return count
    return None


def ends(rows: Sequence[Sequence[int]], texts: Sequence[str]) -> list[int | None]:
    """What `Ending` finds when it is shown the rows token by token."""
    from megatron_rl.rollout.ending import Ending

    ending = Ending(texts, decode, stop=[EOS], rows=len(rows))
    tokens = torch.tensor(rows)
    for count in range(1, len(rows[0]) + 1):
        over = ending(range(len(rows)), tokens[:, count - 1])
        for row, end in enumerate(ending.ends):
            assert bool(over[row]) == (end is not None or EOS in rows[row][:count])
    return ending.ends


@pytest.mark.parametrize("texts", [["</a>"], ["é", "€</a"], ["aaaaaaaaaaaaa"], ["b>"]])
def test_every_row_ends_where_its_text_first_holds_one(texts: list[str]) -> None:
    generator = random.Random(str(texts))
    weights = [60 if "aaa" in texts[0] and token == 0 else 1 for token in range(EOS)]
    rows = [[*generator.choices(range(EOS), weights, k=60)] for _ in range(150)]
    for row in rows[:50]:
        row[generator.randrange(60)] = EOS
    found = ends(rows, texts)
    assert found == [expected_end(row, texts) for row in rows]
    assert found[7:9] == ends(rows[7:9], texts)
    assert sum(end is not None for end in found) > 10 and None in found


def test_a_long_response_is_not_decoded_again_at_every_token() -> None:
    from megatron_rl.rollout.ending import MARGIN, holds_at_end

    asked = []
    assert not holds_at_end([0] * 1000, ["</a>"], lambda tokens: asked.append(len(tokens)) or decode(tokens))
    assert asked == [len("</a>") + MARGIN]


def test_the_audit_knows_both_ways_to_end() -> None:
    from megatron_rl.trainers.audit import audit_rollouts
    from megatron_rl.trainers.rollouts import to_samples
    from megatron_rl.types import Prompt, Reward, Rollout, RolloutGroup

    def mismatches(tokens: tuple[int, ...], finish: str, texts: Sequence[str] = ("</a>",)) -> float:
        zeros = (0.0,) * len(tokens)
        rollout = Rollout(
            prompt_index=0,
            sample_index=0,
            token_ids=tokens,
            text=decode(tokens),
            log_probs=zeros,
            log_kept_mass=zeros,
            finish_reason=finish,  # type: ignore[arg-type]
            policy_version=0,
        )
        prompt = Prompt(index=0, text="", token_ids=(1,))
        groups = [RolloutGroup(prompt=prompt, rollouts=(rollout,), rewards=(Reward(value=0.0),))]
        return audit_rollouts(groups, to_samples(groups), [EOS], texts)["audit/finish_mismatch"]

    by_text, by_token, cut_off = (0, 2, 5), (0, EOS), (0, 0)
    assert mismatches(by_text, "stop") == mismatches(by_token, "stop") == mismatches(cut_off, "length") == 0
    assert mismatches(by_text, "length") == mismatches(by_token, "length") == mismatches(cut_off, "stop") == 1
    assert mismatches((*by_text, EOS), "stop") == mismatches(by_text, "stop", ()) == 1
