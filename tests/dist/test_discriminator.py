"""Scores and the discriminator's update do not depend on how responses are packed, cut and spread over ranks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.models import tiny_model

# Responses of a Qwen tokenizer: one text with its end and without, and two texts of four and of three tokens.
EOS = 151645
ENDED, BARE = [42192, 109391, 115673, EOS], [42192, 109391, 115673]
FOUR, THREE = [103971, 9370, 102477, 40027], [103971, 102477, 40027, EOS]
LAYOUTS = {"tp1": (1, {}), "tp2": (2, {"tp": 2}), "pp2": (2, {"pp": 2})}


def make_discriminator(directory: str, layout: dict, max_tokens: int = 4096, lr: float = 1e-6, **options: Any) -> Any:
    from megatron_rl.config.critic import DiscriminatorConfig, Pooling
    from megatron_rl.trainers.discriminator import Discriminator
    from tests.dist.test_critic import make_critic

    pooling = Pooling(options.pop("pooling", "mean_no_eos"))
    config = DiscriminatorConfig(pooling=pooling, **options)
    critic = make_critic(directory, layout, clip_grad=1e6, lr=lr)
    return Discriminator(config, critic, stop=(EOS, 2), max_tokens=max_tokens)


def scored(directory: str, layout: dict, pooling: str, prompts: list, responses: list, max_tokens: int) -> tuple:
    """The scores of responses, and the values of their tokens; the two sides of a pair are made of neighbours."""
    from megatron_rl.trainers.discriminator import make_pairs

    judge = make_discriminator(directory, layout, max_tokens, pooling=pooling)
    students = [[response] for response in responses[1::2]]
    teachers, pairs = make_pairs(prompts[::2], responses[::2], students, [[False]] * len(students))
    judged = judge.judge(teachers, pairs)
    samples = [*judged.teachers, *(pair.student for pair in judged.pairs)]
    values = judge.critic.values(samples, judge.critic.plan(samples, max_tokens))
    scores = torch.stack([judged.teacher_scores, judged.student_scores], 1).flatten().tolist()
    return scores, [values[s.id] for pair in zip(judged.teachers, (p.student for p in judged.pairs)) for s in pair]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with room for those ids."""
    place = tmp_path_factory.mktemp("models") / "qwen"
    return str(tiny_model(place, "qwen2", tied=True, vocab_size=151936))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_end_of_a_response_does_not_move_its_score(pool: Pool, qwen: str, layout: str) -> None:
    prompts, responses = [[11, 12, 13]] * 4, [BARE, ENDED, FOUR, THREE]
    world, options = LAYOUTS[layout]
    for scores, values in pool.run(scored, world, qwen, options, "mean_no_eos", prompts, responses, 4096):
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
        assert scores[2] == pytest.approx(values[2].mean().item(), abs=1e-6)  # four tokens
        assert scores[3] == pytest.approx(values[3][:3].mean().item(), abs=1e-6)  # three
    # Under the plain mean the value at the end counts, and one text has two scores.
    scores, _ = pool.run(scored, world, qwen, options, "mean", prompts, responses, 4096)[0]
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("layout", ["tp1", pytest.param("tp2", marks=pytest.mark.full)])
def test_a_score_is_the_responses_own(pool: Pool, qwen: str, layout: str) -> None:
    """Alone, among others, in another order, and in small micro-batches."""
    world, options = LAYOUTS[layout]
    prompts, responses = [[11, 12, 13], [7, 8]] * 2, [BARE, ENDED, FOUR, THREE]
    expected = [
        pool.run(scored, world, qwen, options, "mean_no_eos", [prompt] * 2, [response] * 2, 4096)[0][0][0]
        for prompt, response in zip(prompts[::2] * 2, [BARE, FOUR])
    ]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        for max_tokens in (8, 4096):
            chosen = [responses[i] for i in order]
            found, _ = pool.run(
                scored, world, qwen, options, "mean_no_eos", [prompts[i // 2 * 2] for i in order], chosen, max_tokens
            )[0]
            assert found[order.index(0)] == pytest.approx(expected[0], abs=1e-6)
            assert found[order.index(2)] == pytest.approx(expected[1], abs=1e-6)


LOSS: dict[str, Any] = {
    "raw_weight": 0.5,
    "norm_weight": 0.5,
    "debias_length": True,
    "batch_norm": True,
    "temperature": 2.0,
    "label_smoothing": 0.1,
    "l2": 0.01,
    "range_penalty": 0.1,
    "range_high": 1.0,
}
CUTS = {
    "tp1_split": (1, {}, 24),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}, 24),
    "pp2": (2, {"pp": 2}, 24),
    "dp2": (2, {"dp": 2}, 4096),
    "tp2_pp2": (4, {"tp": 2, "pp": 2}, 24),
}


def updated(directory: str, layout: dict, max_tokens: int, options: dict) -> tuple[dict, dict[str, Tensor]]:
    """The figures of an update, and the gradients it was made of: five prompts, uneven, one pair without tokens."""
    from megatron_rl.trainers.discriminator import make_pairs

    judge = make_discriminator(directory, layout, max_tokens, **options)
    draw = torch.Generator().manual_seed(4)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=draw))
        return torch.randint(3, 99, (size,), generator=draw).tolist()

    prompts, teachers = [tokens(2, 7) for _ in range(5)], [[*tokens(4, 12), 2] for _ in range(5)]
    students = [[tokens(1, 9), [*tokens(1, 6), 2]] for _ in range(5)]
    students[3][1] = [2]  # nothing but its end
    same = [[False, place == 2] for place in range(5)]
    judged = judge.judge(*make_pairs(prompts, teachers, students, same))
    figures = judge.update(judged)
    named = {name: gradient.float().clone() for name, gradient in judge.critic.named_hf_gradients()}
    judge.critic.close()
    return figures, named


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "llama", "llama"))


@pytest.fixture(scope="module")
def expected(pool: Pool, model: str) -> tuple[dict, dict[str, Tensor]]:
    return pool.run(updated, 1, model, {}, 4096, LOSS)[0]


# Each axis once; the rest in the long run.
LONG = ("tp1_split", "tp2_pp2")


@pytest.mark.parametrize("cut", [pytest.param(cut, marks=pytest.mark.full) if cut in LONG else cut for cut in CUTS])
def test_the_update_is_the_same_under_every_cut(pool: Pool, model: str, expected: tuple, cut: str) -> None:
    """With everything on that couples the pairs of a batch."""
    world, *options = CUTS[cut]
    figures, gradients = expected
    for found, named in pool.run(updated, world, model, *options, LOSS):
        assert found == pytest.approx(figures, rel=1e-5, abs=1e-7)
        for name, gradient in gradients.items():
            assert (named[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name


def test_figures_of_an_update(expected: tuple) -> None:
    figures, gradients = expected
    assert figures["critic/invalid_pair_ratio"] == pytest.approx(0.1) and figures["critic/skipped"] == 0
    assert 0 < figures["critic/grad_norm"] == figures["critic/grad_norm_clipped"]
    assert figures["critic/identical_text_gap"] > 0 and figures["critic/temperature"] == 2.0
    low, mean, high = (figures[f"critic/teacher_value_{name}"] for name in ("min", "mean", "max"))
    assert low < mean < high
    norm = torch.stack([gradient.double().norm() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(figures["critic/grad_norm"], rel=1e-4)


def training(directory: str, options: dict, steps: int) -> list[dict]:
    """Teachers say 50 where students say 60; the figures of each step."""
    from megatron_rl.trainers.discriminator import make_pairs

    judge = make_discriminator(directory, {"tp": 2}, **options)
    draw, history = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        words = torch.randint(3, 40, (16, 8), generator=draw).tolist()
        teachers, students = [[*word[:5], 50, 2] for word in words], [[[*word[2:8], 60, 2]] for word in words]
        history.append(judge.update(judge.judge(*make_pairs(words, teachers, students, [[False]] * 16))))
    return history


def test_it_learns_to_tell(pool: Pool, model: str) -> None:
    history = pool.run(training, 2, model, {"lr": 3e-3}, 24)[0]
    assert history[-1]["critic/d_acc"] > 0.9 and history[-1]["critic/d_loss"] < 0.5 * history[0]["critic/d_loss"]
    assert history[-1]["critic/score_diff"] > history[0]["critic/score_diff"] + 1


MARK, FILLER, HELD_OUT = 50, 60, 400


def biased_pairs(count: int, seed: int) -> tuple[list, list, list]:
    """Teachers say one word more often, four of five times, students one of five; and they fill up more."""
    draw = torch.Generator().manual_seed(seed)

    def response(low: int, high: int, often: float) -> list[int]:
        size = int(torch.randint(low, high, (), generator=draw))
        words = torch.randint(3, 40, (3,), generator=draw)
        if torch.rand((), generator=draw) < often:
            words[int(torch.randint(0, 3, (), generator=draw))] = MARK
        return [*words.tolist(), *[FILLER] * (size - 3), 2]

    prompts = torch.randint(3, 40, (count, 4), generator=draw).tolist()
    return prompts, [response(6, 16, 0.8) for _ in prompts], [[response(3, 13, 0.2)] for _ in prompts]


def learned(directory: str, options: dict, steps: int) -> list[tuple[float, float]]:
    """(d_acc, correlation of score and length) on held-out pairs, before and after training.

    What is taken off for the length there is what the last batch of training says of it.
    """
    from megatron_rl.algorithms.discriminator import length_correlation, length_slope
    from megatron_rl.trainers.discriminator import make_pairs

    judge = make_discriminator(directory, {}, lr=3e-3, **options)

    def judged(count: int, seed: int) -> Any:
        sides = biased_pairs(count, seed)
        return judge.judge(*make_pairs(*sides, [[False]] * count))

    def slope(batch: Any) -> Tensor | float:
        if not judge.config.debias_length:
            return 0.0
        scores, lengths = (
            torch.cat(both)
            for both in (
                (batch.teacher_scores, batch.student_scores),
                (batch.teacher_lengths, batch.student_lengths),
            )
        )
        return length_slope(scores, lengths, torch.arange(2).repeat_interleave(len(batch.pairs)))

    def measured(of_length: Tensor | float) -> tuple[float, float]:
        held_out = judged(HELD_OUT, 99)
        teacher = held_out.teacher_scores - of_length * held_out.teacher_lengths
        student = held_out.student_scores - of_length * held_out.student_lengths
        return float((teacher > student).double().mean()), length_correlation(student, held_out.student_lengths)

    batch = judged(64, 1)
    history = [measured(slope(batch))]
    for step in range(steps):
        batch = judged(64, step + 1)
        judge.update(batch)
    return [*history, measured(slope(batch))]


@pytest.mark.full
def test_length_is_taken_out_of_scores(pool: Pool, model: str) -> None:
    """Held-out pairs are told apart; the length tells them too, unless it is taken out."""
    (before, _), (after, correlation) = pool.run(learned, 1, model, {}, 30)[0]
    (_, _), (freed, rest) = pool.run(learned, 1, model, {"debias_length": True}, 30)[0]
    assert 0.3 < before < 0.7 < min(after, freed)
    assert abs(correlation) > 0.3 and abs(rest) < 0.15, (before, after, correlation, freed, rest)
