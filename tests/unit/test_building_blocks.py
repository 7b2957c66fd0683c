"""The building blocks: values by hand, gradients, edges, and where they agree with the trainers' own algorithms."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_rl import building_blocks
from megatron_rl.algorithms import policy_loss
from megatron_rl.algorithms.advantages import grpo
from megatron_rl.algorithms.reduction import token_weights
from megatron_rl.building_blocks import (
    compute_entropy,
    compute_group_normalized_rewards,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    get_response_log_probs,
    grpo_microbatch_train_step,
    masked_mean,
    masked_normalize,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)

NAN, INF = math.nan, math.inf


def array(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(got: Tensor, expected: Any) -> None:
    expected = expected if isinstance(expected, Tensor) else array(expected)
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-12, atol=1e-12, equal_nan=True)


# Two responses, of two tokens and of one.
MASK = torch.tensor([[False, True, True], [False, True, False]])


# Tokens

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, **{word: 3 + i for i, word in enumerate("abcdef")}}


def tokenizer(**changes: Any) -> Any:
    """One token per word; `post` is what the tokenizer puts around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post := changes.pop("post", None):
        special = [("<s>", 1), ("</s>", 2)]
        whole.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    special_tokens = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=whole, **special_tokens)


class TestTokenizePromptAndOutput:
    def test_by_hand(self) -> None:
        """Row 0 is the longest; row 1 is cut nowhere, so its last output token is an input; row 2 is half output."""
        result = tokenize_prompt_and_output(["a b", "a", "f"], ["c d e", "b c", "d"], tokenizer())
        assert result["input_ids"].tolist() == [[3, 4, 5, 6], [3, 4, 5, 0], [8, 6, 0, 0]]
        assert result["labels"].tolist() == [[4, 5, 6, 7], [4, 5, 0, 0], [6, 0, 0, 0]]
        assert result["response_mask"].tolist() == [
            [False, True, True, True],
            [True, True, False, False],
            [True, False, False, False],
        ]
        assert {key: value.dtype for key, value in result.items()} == {
            "input_ids": torch.int64,
            "labels": torch.int64,
            "response_mask": torch.bool,
        }

    @pytest.mark.parametrize("lengths", [(1, 4, 2, 3), (5, 1, 3, 3), (2, 2, 2, 2)])
    def test_structure(self, lengths: tuple[int, ...]) -> None:
        """Labels are inputs moved by one; under the mask they are the outputs' tokens, in order and all of them."""
        tok = tokenizer()
        prompts = [" ".join("abc"[:n]) for n in (1, 2, 3, 1)]
        outputs = [" ".join(("abcdef" * 2)[n : 2 * n]) for n in lengths]
        result = tokenize_prompt_and_output(prompts, outputs, tok)
        longest = max(len(f"{p} {o}".split()) for p, o in zip(prompts, outputs))
        assert all(tensor.shape == (4, longest - 1) for tensor in result.values())
        assert torch.equal(result["labels"][:, :-1], result["input_ids"][:, 1:])
        for row, (prompt, output) in enumerate(zip(prompts, outputs)):
            mask, start, size = result["response_mask"][row], len(prompt.split()) - 1, len(output.split())
            assert mask.nonzero().flatten().tolist() == list(range(start, start + size))
            assert result["labels"][row][mask].tolist() == [WORDS[word] for word in output.split()]
            assert result["input_ids"][row, : start + 1].tolist() == [WORDS[word] for word in prompt.split()]
            assert not result["labels"][row, start + size :].any()

    def test_an_empty_output(self) -> None:
        result = tokenize_prompt_and_output(["a b", "a"], ["", "b c"], tokenizer())
        assert result["input_ids"].tolist() == [[3, 4], [3, 4]]
        assert result["response_mask"].tolist() == [[False, False], [True, True]]

    def test_texts_are_not_joined_before_they_are_tokenised(self) -> None:
        """Otherwise a word would begin in the prompt and end in the output."""
        result = tokenize_prompt_and_output(["a"], ["b"], tokenizer())
        assert (result["input_ids"].tolist(), result["labels"].tolist()) == ([[3]], [[4]])

    def test_special_tokens(self) -> None:
        """A beginning belongs to the prompt, and none comes in between; an end is refused."""
        result = tokenize_prompt_and_output(["a"], ["b </s>"], tokenizer(post="<s> $A"))
        assert (result["input_ids"].tolist(), result["labels"].tolist()) == ([[1, 3, 4]], [[3, 4, 2]])
        assert result["response_mask"].tolist() == [[False, True, True]]
        with pytest.raises(ValueError, match=r"prompt_strs\[0\].*ends every text with '</s>'"):
            tokenize_prompt_and_output(["a"], ["b"], tokenizer(post="$A </s>"))

    def test_padding_tokens(self) -> None:
        result = tokenize_prompt_and_output(["a", "a b"], ["c", "d e"], tokenizer(pad_token=None))
        assert result["labels"].tolist() == [[5, 2, 2], [4, 6, 7]]
        with pytest.raises(ValueError, match=r"neither a pad_token nor an eos_token.*set tokenizer\.pad_token"):
            tokenize_prompt_and_output(["a"], ["b"], tokenizer(pad_token=None, eos_token=None))

    @pytest.mark.parametrize(
        ("prompts", "outputs", "message"),
        [
            (["a", "b"], ["c"], "2 prompt_strs and 1 output_strs"),
            ([], [], "prompt_strs is empty"),
            (["a", ""], ["b", "c"], r"prompt_strs\[1\]: the prompt is empty"),
        ],
    )
    def test_refused(self, prompts: list[str], outputs: list[str], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tokenize_prompt_and_output(prompts, outputs, tokenizer())


# Log-probabilities and entropy


class Bigram(nn.Module):
    """A language model that looks at one token: logits [V, V]."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits[input_ids])


class TestLogProbs:
    def test_entropy_by_hand(self) -> None:
        """Probabilities of 1/4 each; 1/2 and 1/4 twice; 1; and the last again far from 0."""
        logits = array([[0, 0, 0, 0], [math.log(2), 0, 0, -INF], [0, -INF, -INF, -INF], [1e4, 0, 0, 0]])
        assert_close(compute_entropy(logits), [math.log(4), 1.5 * math.log(2), 0, 0])
        assert compute_entropy(logits.reshape(2, 2, 4)).shape == (2, 2)
        assert_close(compute_entropy(logits + 100), compute_entropy(logits))

    def test_entropy_gradient(self) -> None:
        """-p (log p + H)."""
        logits = random(3, 5).requires_grad_()
        entropy = compute_entropy(logits)
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        logp = logits.log_softmax(-1)
        assert_close(gradient, -logp.exp() * (logp + entropy[:, None]))
        assert torch.autograd.gradcheck(compute_entropy, logits)
        impossible = array([[0.0, 0.0, -INF]]).requires_grad_()
        assert_close(torch.autograd.grad(compute_entropy(impossible).sum(), impossible)[0], [[0.0, 0.0, 0.0]])

    def test_of_a_model(self) -> None:
        logits = random(4, 4)
        model, rows = Bigram(logits), torch.tensor([[1, 2, 3], [3, 0, 0]])
        labels = torch.tensor([[2, 3, 1], [0, 0, 0]])
        result = get_response_log_probs(model, rows, labels, return_token_entropy=True)
        table = logits.log_softmax(-1)
        assert_close(result["log_probs"], [[table[1, 2], table[2, 3], table[3, 1]], [table[3, 0], *[table[0, 0]] * 2]])
        assert_close(result["token_entropy"], compute_entropy(logits)[rows])
        assert set(get_response_log_probs(model, rows, labels)) == {"log_probs"}

    def test_gradient(self) -> None:
        """Of log p_y: one-hot of y, less p."""
        model = Bigram(random(3, 3))
        get_response_log_probs(model, torch.tensor([[1, 1]]), torch.tensor([[0, 2]]))["log_probs"].sum().backward()
        expected = torch.zeros(3, 3, dtype=torch.float64)
        expected[1] = array([1, 0, 1]) - 2 * model.logits[1].detach().softmax(-1)
        assert model.logits.grad is not None
        assert_close(model.logits.grad, expected)

    def test_float32_at_least(self) -> None:
        """The logarithm of a sum of bfloat16 numbers would be off by up to 2^-8 of itself."""
        logits = (10 * random(4, 50)).to(torch.bfloat16)
        rows = torch.tensor([[0, 1, 2, 3]])
        result = get_response_log_probs(Bigram(logits), rows, rows, return_token_entropy=True)
        exact = logits.double().log_softmax(-1)
        torch.testing.assert_close(result["log_probs"][0], exact[range(4), range(4)].float(), rtol=1e-6, atol=1e-6)
        assert compute_entropy(logits).dtype == result["token_entropy"].dtype == torch.float32

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match=r"input_ids has shape \[1, 2\] and labels \[1, 1\]"):
            get_response_log_probs(Bigram(random(3, 3)), torch.tensor([[0, 1]]), torch.tensor([[1]]))

    def test_padding_on_the_right_needs_no_attention_mask(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes)).eval()
        short, long = (
            tokenize_prompt_and_output(["a b", "c"][:n], ["c d", "a b c d e"][:n], tokenizer()) for n in (1, 2)
        )
        with torch.no_grad():
            alone, padded = (
                get_response_log_probs(model, x["input_ids"], x["labels"])["log_probs"] for x in (short, long)
            )
        torch.testing.assert_close(padded[0, :3], alone[0], rtol=1e-5, atol=1e-6)


# Masks

VALUES = [[9.0, 1.0, 2.0], [9.0, 4.0, 9.0]]


class TestMasked:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
    @pytest.mark.parametrize(
        ("dim", "total", "mean"), [(None, 7, 7 / 3), (0, [0, 5, 2], [NAN, 2.5, 2]), (1, [3, 4], [1.5, 4])]
    )
    def test_by_hand(self, dtype: torch.dtype, dim: int | None, total: Any, mean: Any) -> None:
        """Nothing is kept of the first column, so its mean is 0 / 0."""
        mask = MASK.to(dtype)
        assert_close(masked_mean(array(VALUES), mask, dim), mean)
        assert_close(masked_normalize(array(VALUES), mask, dim, 4.0), array(total) / 4)
        assert_close(masked_normalize(array(VALUES), mask, dim), total)
        if dim == 1:
            assert_close(masked_mean(array(VALUES), mask, dim=-1), mean)
        assert_close(masked_mean(array(VALUES), torch.zeros_like(mask)), NAN)
        assert_close(masked_normalize(array(VALUES), torch.zeros_like(mask)), 0.0)

    def test_gradients(self) -> None:
        values = array(VALUES).requires_grad_()
        (gradient,) = torch.autograd.grad(masked_mean(values, MASK, 1).sum(), values)
        assert_close(gradient, [[0, 0.5, 0.5], [0, 1, 0]])
        (gradient,) = torch.autograd.grad(masked_normalize(values, MASK, None, 4.0), values)
        assert_close(gradient, MASK / 4)

    def test_a_mask_may_weigh(self) -> None:
        weights = array([[0, 1, 3], [0, 0.5, 0]])
        assert_close(masked_mean(array(VALUES), weights, 1), [7 / 4, 4])
        assert_close(masked_normalize(array(VALUES), weights, 1), [7, 2])

    def test_what_is_masked_does_not_matter(self) -> None:
        values = array([[NAN, 1, 2], [INF, 4, -INF]]).requires_grad_()
        loss = masked_mean(values, MASK) + masked_normalize(values, MASK)
        assert_close(loss.detach(), 7 + 7 / 3)
        assert_close(torch.autograd.grad(loss, values)[0], MASK.double() * (1 + 1 / 3))

    def test_inputs_are_not_changed(self) -> None:
        values, mask = array(VALUES), MASK.double()
        masked_normalize(values, mask, 1, 3.0)
        masked_mean(values, mask, 1)
        assert_close(values, VALUES)
        assert_close(mask, MASK)

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="normalize_constant is 0"):
            masked_normalize(array(VALUES), MASK, normalize_constant=0)
        for function in (masked_mean, masked_normalize):
            with pytest.raises(ValueError, match=r"mask has shape \[3\] and the tensor \[2, 3\]"):
                function(array(VALUES), MASK[0], 1)


# Advantages


def judge(response: str, truth: str) -> dict[str, float]:
    right = float(response == truth)
    return {"reward": right, "format_reward": 1.0, "half": right / 2}


def of_numbers(rewards: list[float], size: int, eps: float = 0.0, by_std: bool = True) -> tuple[Tensor, Tensor, dict]:
    texts = [str(reward) for reward in rewards]
    return compute_group_normalized_rewards(lambda text, _: {"reward": float(text)}, texts, texts, size, eps, by_std)


class TestGroupNormalizedRewards:
    def test_by_hand(self) -> None:
        """Groups of 1, 0, 0 and 0, 0, 1: mean 1/3 and unbiased variance 1/3."""
        case = judge, ["x", "y", "z", "x", "y", "z"], ["x"] * 3 + ["z"] * 3, 3
        scale = math.sqrt(1 / 3) + 0.5
        for by_std, unit in ((True, scale), (False, 1.0)):
            advantages, raw, figures = compute_group_normalized_rewards(*case, 0.5, by_std)
            expected = torch.tensor([2, -1, -1, -1, -1, 2], dtype=torch.float64) / 3 / unit
            torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=1e-7)
            assert raw.tolist() == [1, 0, 0, 0, 0, 1]
            assert advantages.dtype == raw.dtype == torch.float32
            assert figures == {
                "format_reward": 1.0,
                "half": pytest.approx(1 / 6),
                "mean": pytest.approx(1 / 3),
                "std": pytest.approx(math.sqrt(2 / 9)),
                "min": 0.0,
                "max": 1.0,
                "silent_groups": 0.0,
            }

    @pytest.mark.parametrize("by_std", [True, False])
    def test_the_trainers_advantages(self, by_std: bool) -> None:
        rewards = random(12).float()
        advantages, raw, _ = of_numbers(rewards.tolist(), 4, 1e-6, by_std)
        expected = grpo(raw, torch.arange(12) // 4, normalize_by_std=by_std, eps=1e-6)
        assert torch.equal(advantages, expected.float())

    @pytest.mark.parametrize("by_std", [True, False])
    def test_equal_rewards_teach_nothing(self, by_std: bool) -> None:
        """The mean of eight 0.3 in float32 is not 0.3, and 1e-6 is no larger than the difference."""
        advantages, _, figures = of_numbers([0.3] * 8 + [0.0, 1.0] * 4, 8, 1e-6, by_std)
        assert not advantages[:8].any()
        assert advantages[8:].all()
        assert figures["silent_groups"] == 0.5

    @pytest.mark.parametrize("by_std", [True, False])
    def test_a_group_of_one_has_no_deviation(self, by_std: bool) -> None:
        assert of_numbers([1.0, 5.0], 1, 1e-6, by_std)[0].tolist() == [0, 0]

    def test_nan_is_in_no_statistic(self) -> None:
        advantages, raw, figures = of_numbers([1.0, NAN, 3.0], 3, by_std=False)
        assert advantages.tolist() == [-1, 0, 1]
        assert raw.isnan().tolist() == [False, True, False]
        assert math.isnan(figures["mean"])

    @pytest.mark.parametrize(("count", "size"), [(6, 4), (3, 4), (0, 4), (4, 0), (4, -2)])
    def test_groups_must_be_whole(self, count: int, size: int) -> None:
        with pytest.raises(
            ValueError, match=f"{count} rollout_responses do not make whole groups of group_size={size}"
        ):
            of_numbers([1.0] * count, size)

    def test_refused(self) -> None:
        with pytest.raises(ValueError, match="2 rollout_responses and 1 repeated_ground_truths"):
            compute_group_normalized_rewards(judge, ["x", "y"], ["x"], 2, 1e-6, True)
        for wrong in ({"score": 1.0}, 1.0):
            with pytest.raises(ValueError, match='for response 0: return a dict with the key "reward"'):
                compute_group_normalized_rewards(lambda _, __, w=wrong: w, ["x"], ["x"], 1, 1e-6, True)

    def test_figures_of_some_responses_only(self) -> None:
        def reward(response: str, truth: str) -> dict[str, Any]:
            return {"reward": 1, "note": "read"} | ({"digits": 3} if response == "y" else {})

        figures = compute_group_normalized_rewards(reward, ["x", "y"], ["", ""], 2, 1e-6, True)[2]
        assert figures["digits"] == 3.0
        assert "note" not in figures


# Losses


class TestLosses:
    def test_naive_by_hand(self) -> None:
        logp = array([[-1, -2], [-3, -4]]).requires_grad_()
        loss = compute_naive_policy_gradient_loss(array([[2], [-0.5]]), logp)
        assert_close(loss.detach(), [[2, 4], [-1.5, -2]])
        assert_close(torch.autograd.grad(loss.sum(), logp)[0], [[-2, -2], [0.5, 0.5]])

    @pytest.mark.parametrize(
        ("ratio", "advantage", "loss", "slope", "clipped"),
        [
            (1.0, 2.0, -2.0, -2.0, False),
            (1.1, 2.0, -2.2, -2.2, False),
            (1.5, 2.0, -2.4, 0.0, True),
            (0.5, 2.0, -1.0, -1.0, False),
            (0.5, -2.0, 1.6, 0.0, True),
            (1.5, -2.0, 3.0, 3.0, False),
            (1e9, -2.0, 2e9, 2e9, False),  # no dual clip, no clamp of the log-ratio at 20
            (1e-9, 2.0, -2e-9, -2e-9, False),
            (1.5, 0.0, 0.0, 0.0, False),
        ],
    )
    def test_grpo_clip_by_hand(self, ratio: float, advantage: float, loss: float, slope: float, clipped: bool) -> None:
        logp = array([[math.log(ratio)]]).requires_grad_()
        got, figures = compute_grpo_clip_loss(array([[advantage]]), logp, array([[0.0]]), 0.2)
        torch.testing.assert_close(got.detach(), array([[loss]]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(torch.autograd.grad(got.sum(), logp)[0], array([[slope]]), rtol=1e-9, atol=1e-12)
        assert figures["clipped"].tolist() == [[clipped]]

    def test_grpo_clip_of_rows(self) -> None:
        """Against the definition written out, and by finite differences; seed 1 clips some tokens and not others."""
        advantages, old = array([[1.5], [-0.7], [0.3]]), random(3, 8) - 3
        logp = (old + 0.4 * random(3, 8, seed=1)).requires_grad_()
        loss, figures = compute_grpo_clip_loss(advantages, logp, old, 0.2)
        ratio = (logp - old).exp()
        expected = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        assert_close(loss.detach(), expected.detach())
        gradient, dense = (torch.autograd.grad(x.sum(), logp, retain_graph=True)[0] for x in (loss, expected))
        assert_close(gradient, dense)
        assert torch.equal(figures["clipped"], gradient == 0)
        assert 0 < int(figures["clipped"].sum()) < 24
        assert torch.autograd.gradcheck(lambda x: compute_grpo_clip_loss(advantages, x, old, 0.2)[0], logp)

    def test_old_log_probs_are_constants(self) -> None:
        """Even where they come with the same graph, and the ratio would have no gradient."""
        logp = array([[-1.0]]).requires_grad_()
        loss = compute_grpo_clip_loss(array([[2.0]]), logp, logp, 0.2)[0]
        assert_close(torch.autograd.grad(loss.sum(), logp)[0], [[-2.0]])

    def test_the_trainers_losses(self) -> None:
        """The same within their bounds: log-ratios of at most 20, and ratios of at most 3 where A < 0."""
        advantages, old = random(4, 1), random(4, 8) - 3
        logp = old + 0.3 * random(4, 8, seed=1)
        flat = logp.flatten(), old.flatten(), advantages.expand(4, 8).flatten()
        got, figures = compute_grpo_clip_loss(advantages, logp, old, 0.2)
        theirs = policy_loss.ppo_clip(*flat, clip_low=0.2, clip_high=0.2)
        assert_close(got.flatten(), theirs.loss)
        assert torch.equal(figures["clipped"].flatten(), theirs.clipped)
        naive = compute_naive_policy_gradient_loss(advantages, logp)
        assert torch.equal(naive.flatten(), policy_loss.reinforce(*flat).loss)

    def test_dispatch(self) -> None:
        logp, old = random(2, 3), random(2, 3, seed=1)
        rewards, advantages = array([[1.0], [0.0]]), array([[0.5], [-0.5]])
        given: dict[str, Any] = {"raw_rewards": rewards, "advantages": advantages}
        given |= {"old_log_probs": old, "cliprange": 0.2}
        loss, figures = compute_policy_gradient_loss(logp, "no_baseline", **given)
        assert (loss.tolist(), figures) == ((-rewards * logp).tolist(), {})
        loss, figures = compute_policy_gradient_loss(logp, "reinforce_with_baseline", **given)
        assert (loss.tolist(), figures) == ((-advantages * logp).tolist(), {})
        loss, figures = compute_policy_gradient_loss(logp, "grpo_clip", **given)
        expected = compute_grpo_clip_loss(advantages, logp, old, 0.2)
        assert torch.equal(loss, expected[0])
        assert torch.equal(figures["clipped"], expected[1]["clipped"])

    @pytest.mark.parametrize(
        ("loss_type", "needed"),
        [
            ("no_baseline", ["raw_rewards"]),
            ("reinforce_with_baseline", ["advantages"]),
            ("grpo_clip", ["advantages", "old_log_probs", "cliprange"]),
        ],
    )
    def test_what_is_missing_is_named(self, loss_type: Any, needed: list[str]) -> None:
        column = array([[1.0]])
        given: dict[str, Any] = {"raw_rewards": column, "advantages": column, "old_log_probs": column, "cliprange": 0.2}
        compute_policy_gradient_loss(column, loss_type, **{name: given[name] for name in needed})
        for name in needed:
            with pytest.raises(ValueError, match=f"loss_type {loss_type} needs {name}, which is None"):
                compute_policy_gradient_loss(column, loss_type, **given | {name: None})

    def test_refused(self) -> None:
        logp = random(2, 2)
        with pytest.raises(
            ValueError, match="loss_type is 'ppo'; choose one of no_baseline, reinforce_with_baseline, g"
        ):
            compute_policy_gradient_loss(logp, "ppo")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"cliprange is -0.1"):
            compute_grpo_clip_loss(array([[1], [1]]), logp, logp, -0.1)
        # With as many responses as tokens, [B] would pass for one number per token.
        with pytest.raises(
            ValueError, match=r"advantages has shape \[2\], where \[2, 1\] or \[2, 2\].*advantages\[:, N"
        ):
            compute_grpo_clip_loss(array([1, 2]), logp, logp, 0.2)
        with pytest.raises(ValueError, match=r"raw_rewards_or_advantages has shape \[2\]"):
            compute_naive_policy_gradient_loss(array([1, 2]), logp)
        with pytest.raises(ValueError, match=r"old_log_probs has shape \[2, 1\], where \[2, 2\]"):
            compute_grpo_clip_loss(array([[1], [1]]), logp, logp[:, :1], 0.2)


# Steps


def sft(logp: Tensor, mask: Tensor, steps: int, *options: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, figures and gradient."""
    leaf = logp.clone().requires_grad_()
    loss, figures = sft_microbatch_train_step(leaf, mask, steps, *options)
    assert leaf.grad is not None
    return loss, figures, leaf.grad


def policy_step(logp: Tensor, mask: Tensor, steps: int, *args: Any, **given: Any) -> tuple[Tensor, dict, Tensor]:
    leaf = logp.clone().requires_grad_()
    loss, figures = grpo_microbatch_train_step(leaf, mask, steps, *args, **given)
    assert leaf.grad is not None
    return loss, figures, leaf.grad


LOGP = -array([[9.0, 1.0, 2.0], [9.0, 4.0, 9.0]])


class TestSftStep:
    def test_by_hand(self) -> None:
        loss, figures, gradient = sft(LOGP, MASK, 2, 10.0)
        assert_close(loss, (3 + 4) / 2 / 10 / 2)
        assert_close(gradient, -MASK.double() / (2 * 10 * 2))
        assert_close(figures["nll"], 7 / 3)
        assert figures["response_tokens"] == 3
        assert not loss.requires_grad
        assert_close(sft(LOGP, MASK, 1)[0], 3.5)

    def test_gradients_add_up(self) -> None:
        """Ten micro-batches into one gradient."""
        leaf = LOGP.clone().requires_grad_()
        losses = [sft_microbatch_train_step(leaf, MASK, 10)[0] for _ in range(10)]
        assert_close(torch.stack(losses).sum(), 3.5)
        assert leaf.grad is not None
        assert_close(leaf.grad, -MASK.double() / 2)

    def test_a_response_without_tokens_counts(self) -> None:
        loss, figures, gradient = sft(LOGP, MASK & torch.tensor([[True], [False]]), 1)
        assert_close(loss, 1.5)
        assert_close(gradient, -array([[0, 0.5, 0.5], [0, 0, 0]]))
        loss, figures, gradient = sft(LOGP, torch.zeros_like(MASK), 1)
        assert (float(loss), int(figures["response_tokens"]), bool(gradient.any())) == (0, 0, False)
        assert figures["nll"].isnan()

    def test_the_trainers_weights(self) -> None:
        """Cut into micro-batches of one size, all in all it is seq-mean-token-sum-norm with that horizon."""
        logp, mask = -random(6, 5).abs(), random(6, 5, seed=1) > -0.5
        mask[:, 0] = True
        weights = torch.stack(token_weights(list(mask), "seq-mean-token-sum-norm", horizon=7))
        parts = [sft(logp[rows], mask[rows], 3, 7.0) for rows in (slice(0, 2), slice(2, 4), slice(4, 6))]
        assert_close(torch.stack([part[0] for part in parts]).sum(), (weights * -logp).sum())
        assert_close(torch.cat([part[2] for part in parts]), -weights)


class TestGrpoStep:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
    def test_by_hand(self, dtype: torch.dtype) -> None:
        """Means of -A log p: 2 (1 + 2) / 2 = 3, and -1 * 4."""
        given = {"advantages": array([[2], [-1]]), "raw_rewards": array([[1], [0]])}
        loss, figures, gradient = policy_step(LOGP, MASK.to(dtype), 4, "reinforce_with_baseline", **given)
        assert_close(loss, (3 - 4) / 2 / 4)
        assert_close(gradient, -array([[0, 1, 1], [0, -1, 0]]) / 8)
        assert figures == {}
        assert not loss.requires_grad
        assert_close(policy_step(LOGP, MASK, 1, "no_baseline", **given)[0], 1.5 / 2)

    def test_clip_by_hand(self) -> None:
        """Ratios of 1.5 and 1, clipped at 1.2 where A > 0; and of 1.5, not clipped where A < 0."""
        old = LOGP - math.log(1.5) * array([[1, 1, 0], [1, 1, 1]])
        case = "grpo_clip", None, array([[2], [-1]]), old, 0.2
        loss, figures, gradient = policy_step(LOGP, MASK, 1, *case)
        assert_close(loss, (-(2.4 + 2) / 2 + 1.5) / 2)
        assert_close(gradient, [[0, 0, -0.5], [0, 0.75, 0]])
        assert figures["clipped"].tolist() == [[False, True, False], [False, False, False]]
        assert_close(figures["clip_fraction"], 1 / 3)

    def test_what_is_masked_does_not_matter(self) -> None:
        """Not even a ratio that overflows, or old log-probabilities that are NaN where there are none."""
        old = LOGP.clone()
        clean = policy_step(LOGP, MASK, 1, "grpo_clip", None, array([[2], [-1]]), old, 0.2)
        for noise in (NAN, INF, -INF, -1e4):
            got = policy_step(LOGP, MASK, 1, "grpo_clip", None, array([[2], [-1]]), old.where(MASK, noise), 0.2)
            assert torch.equal(got[0], clean[0])
            assert torch.equal(got[2], clean[2])

    @pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline", "grpo_clip"])
    def test_the_trainers_weights(self, loss_type: Any) -> None:
        """Cut into micro-batches of one size, all in all it is seq-mean-token-mean of the trainers' loss per token."""
        old, mask = random(6, 5) - 3, random(6, 5, seed=1) > -0.5
        mask[:, 0] = True
        logp, advantages = (old + 0.3 * random(6, 5, seed=2)).requires_grad_(), random(6, 1, seed=3)
        every = advantages.expand(6, 5)[mask]
        if loss_type == "grpo_clip":
            per_token = policy_loss.ppo_clip(logp[mask], old[mask], every).loss
        else:
            per_token = policy_loss.reinforce(logp[mask], old[mask], every).loss
        weights = torch.stack(token_weights(list(mask), "seq-mean-token-mean"))
        whole = (weights[mask] * per_token).sum()
        (gradient,) = torch.autograd.grad(whole, logp)
        parts = []
        for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
            given = {"raw_rewards": advantages[rows], "advantages": advantages[rows], "old_log_probs": old[rows]}
            parts.append(policy_step(logp.detach()[rows], mask[rows], 3, loss_type, **given, cliprange=0.2))
        assert_close(torch.stack([part[0] for part in parts]).sum(), whole.detach())
        assert_close(torch.cat([part[2] for part in parts]), gradient)

    def test_a_response_without_tokens_is_refused(self) -> None:
        leaf = LOGP.clone().requires_grad_()
        with pytest.raises(ValueError, match=r"no token in rows \[1\]"):
            grpo_microbatch_train_step(
                leaf, MASK & torch.tensor([[True], [False]]), 1, "no_baseline", array([[1], [0]])
            )
        assert leaf.grad is None

    def test_refused(self) -> None:
        column, leaf = array([[1], [0]]), LOGP.clone().requires_grad_()
        with pytest.raises(ValueError, match="loss_type no_baseline needs raw_rewards"):
            grpo_microbatch_train_step(leaf, MASK, 1, "no_baseline", advantages=column)
        with pytest.raises(ValueError, match="loss_type is 'drgrpo'"):
            grpo_microbatch_train_step(leaf, MASK, 1, "drgrpo", column)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"policy_log_probs has shape \[2, 3\] and response_mask \[2, 2\]"):
            grpo_microbatch_train_step(leaf, MASK[:, 1:], 1, "no_baseline", column)
        with pytest.raises(ValueError, match=r"old_log_probs has shape \[2, 1\]"):
            grpo_microbatch_train_step(leaf, MASK, 1, "grpo_clip", None, column, LOGP[:, :1], 0.2)


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("step", [sft, policy_step])
def test_accumulation_is_of_at_least_one(step: Callable[..., Any], steps: int) -> None:
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps is {steps}"):
        step(LOGP, MASK, steps, *(("no_baseline", array([[1], [0]])) if step is policy_step else ()))


def test_all_are_exported() -> None:
    assert all(callable(getattr(building_blocks, name)) for name in building_blocks.__all__ if name.islower())
