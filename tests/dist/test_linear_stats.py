"""The vocabulary-parallel operator against the dense definition, in float64, over real tensor-parallel ranks."""

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool

VOCABULARY, HIDDEN, TOKENS, ROWS = 203, 24, 37, {1: 208, 2: 112, 4: 64}


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return draw(TOKENS, HIDDEN), draw(VOCABULARY, HIDDEN), labels, draw(TOKENS), draw(TOKENS)


def sharded(tp: int, temperature: float, chunk: int) -> tuple[Tensor, ...]:
    """logp, entropy, hidden's gradient, and this rank's weight gradient, padded rows included."""
    from megatron_rl.ops.linear_stats import linear_stats
    from megatron_rl.ops.vocab_shard import VocabShard
    from megatron_rl.parallel.mesh import create_mesh

    # isort: split
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    mesh = create_mesh(tp=tp)
    shard = VocabShard.of(VOCABULARY, ROWS[tp], mesh.tp_rank, mesh.tp_group)
    hidden, full, labels, g_logp, g_entropy = problem()
    # Garbage in the padding must not matter.
    weight = torch.full((ROWS[tp], HIDDEN), 1e3, dtype=torch.float64)
    weight[: shard.stop - shard.start] = full[shard.start : shard.stop]
    hidden.requires_grad_()
    weight.requires_grad_()
    stats = linear_stats(
        copy_to_tensor_model_parallel_region(hidden),
        weight,
        labels,
        shard=shard,
        temperature=temperature,
        entropy=True,
        chunk=chunk,
    )
    (g_logp @ stats.logp + g_entropy @ stats.entropy).backward()
    return stats.logp.detach(), stats.entropy.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("temperature, chunk", [(1.0, 1024), (0.7, 16)])
def test_equals_dense(pool: Pool, tp: int, temperature: float, chunk: int) -> None:
    from megatron_rl.ops.reference import linear_stats as dense

    hidden, weight, labels, g_logp, g_entropy = problem()
    hidden.requires_grad_()
    weight.requires_grad_()
    logp, entropy = dense(hidden, weight, labels, temperature)
    (g_logp @ logp + g_entropy @ entropy).backward()
    answers = pool.run(sharded, tp, tp, temperature, chunk)
    for found_logp, found_entropy, found_hidden, _ in answers:
        for found, expected in ((found_logp, logp), (found_entropy, entropy), (found_hidden, hidden.grad)):
            assert (found - expected).abs().max() < 1e-12
    found_weight = torch.cat([answer[3] for answer in answers])
    assert (found_weight[:VOCABULARY] - weight.grad).abs().max() < 1e-12
    assert found_weight[VOCABULARY:].abs().max() == 0
