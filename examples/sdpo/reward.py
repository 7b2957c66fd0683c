"""1 for the right sum; for anything else 0, and feedback that says which digits are too low or too high."""

from megatron_rl.types import Prompt, Reward, Rollout

PLACES = ("ones", "tens", "hundreds")


def feedback(response: str, answer: str) -> str:
    """What is wrong with a response: "122: low tens", or that it is no number of at most three digits."""
    if not (response.isascii() and response.isdigit() and str(int(response)) == response and len(response) <= 3):
        return f"{response}: no number"
    digits = zip(PLACES, response.zfill(3)[::-1], answer.zfill(3)[::-1])
    wrong = [f"{'low' if given < right else 'high'} {place}" for place, given, right in digits if given != right]
    return f"{response}: {', '.join(wrong)}"


def addition(prompt: Prompt, rollout: Rollout) -> Reward:
    answer, response = prompt.row["answer"], rollout.text.strip()
    if response == answer:
        return Reward(value=1.0, parts={"accuracy": 1.0})
    return Reward(value=0.0, parts={"accuracy": 0.0}, feedback=feedback(response, answer))
