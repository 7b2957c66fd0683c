"""1 for the right sum; for anything else 0, and feedback that says which digits are wrong."""

from megatron_rl.types import Prompt, Reward, Rollout

PLACES = ("ones", "tens", "hundreds")


def feedback(response: str, answer: str) -> str:
    """What is wrong with a response: "122: wrong tens", or that it is no sum of two digits each."""
    if not (response.isascii() and response.isdigit() and len(response) <= len(PLACES)):
        return f"{response}: no sum"
    digits = zip(PLACES, response[::-1].ljust(len(PLACES)), answer[::-1].ljust(len(PLACES)))
    return f"{response}: wrong {' and '.join(place for place, given, right in digits if given != right)}"


def addition(prompt: Prompt, rollout: Rollout) -> Reward:
    answer, response = prompt.row["answer"], rollout.text.strip()
    if response == answer:
        return Reward(value=1.0, parts={"accuracy": 1.0})
    return Reward(value=0.0, parts={"accuracy": 0.0}, feedback=feedback(response, answer))
