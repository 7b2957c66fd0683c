"""Lists and divergences over tensor-parallel ranks: float64 against the dense definition, and ids under ties."""

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool

VOCABULARY, HIDDEN, TOKENS, ROWS = 203, 24, 37, {1: 208, 2: 112, 4: 64}
KS = (1, 20, VOCABULARY)
ALPHAS = (0.0, 0.5, 1.0)
# Few values, so that ties lie across the shards' borders; exact in bfloat16.
TIED = torch.randint(-3, 4, (TOKENS, VOCABULARY), generator=torch.Generator().manual_seed(5)).bfloat16()
TIED[0] = 1


def problem() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "hidden": draw(TOKENS, HIDDEN),
        "weight": draw(VOCABULARY, HIDDEN),
        "teacher_hidden": draw(TOKENS, HIDDEN),
        "teacher_weight": draw(VOCABULARY, HIDDEN),
        "labels": torch.randint(0, VOCABULARY, (TOKENS,), generator=generator),
        "of_logp": draw(TOKENS),
        "of_entropy": draw(TOKENS),
        "of_topk": draw(TOKENS, VOCABULARY),
        "of_tail": draw(TOKENS),
    }


def total(logp: Tensor, entropy: Tensor, topk: Tensor, tail: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One scalar of all outputs."""
    return (
        p["of_logp"] @ logp
        + p["of_entropy"] @ entropy
        + p["of_tail"] @ tail
        + (p["of_topk"][:, : topk.shape[1]] * topk).sum()
    )


def sharded(tp: int) -> dict[str, list[Tensor]]:
    """All cases of one layout: values, the hidden states' gradient, this rank's weight gradient, ids."""
    from megatron_rl.ops.divergence import Head, full_divergence, paired_stats
    from megatron_rl.ops.linear_stats import linear_stats
    from megatron_rl.ops.vocab_shard import VocabShard
    from megatron_rl.parallel.mesh import create_mesh

    # isort: split
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    mesh = create_mesh(tp=tp)
    shard = VocabShard.of(VOCABULARY, ROWS[tp], mesh.tp_rank, mesh.tp_group)
    p = problem()

    def rows(full: Tensor) -> Tensor:
        """This rank's; garbage in the padding must not matter."""
        mine = torch.full((ROWS[tp], full.shape[1]), 1e3, dtype=full.dtype)
        mine[: shard.size] = full[shard.start : shard.stop]
        return mine.requires_grad_()

    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, (hidden, weight)))

    hidden, weight = p["hidden"].requires_grad_(), rows(p["weight"])
    entered = copy_to_tensor_model_parallel_region(hidden)
    found: dict[str, list[Tensor]] = {}
    for k in KS:
        stats = linear_stats(entered, weight, p["labels"], shard=shard, temperature=0.7, k=k, chunk=16)
        values = [stats.logp, stats.entropy, stats.topk_logp, stats.tail_logp]
        found[f"k={k}"] = [*(x.detach() for x in values), stats.topk_ids, *gradients(total(*values, p))]
    student, teacher = Head(entered, weight), Head(p["teacher_hidden"], rows(p["teacher_weight"]))
    for alpha in ALPHAS:
        loss = full_divergence(student, teacher, p["labels"], alpha=alpha, shard=shard, chunk=16).loss
        found[f"alpha={alpha}"] = [loss.detach(), *gradients(p["of_logp"] @ loss)]
    pair = paired_stats(student, teacher, p["labels"], support="teacher", k=5, shard=shard, chunk=16)
    values = [pair.student.logp, pair.student.entropy, pair.student.topk_logp, pair.student.tail_logp]
    found["pair"] = [*(x.detach() for x in values), pair.student.topk_ids, *gradients(total(*values, p))]
    found["pair"] += [pair.teacher.topk_logp, pair.teacher.tail_logp, pair.student.largest_ids]
    identity = rows(torch.eye(VOCABULARY, dtype=torch.bfloat16))
    for k in KS:
        found[f"tied k={k}"] = [
            linear_stats(TIED, identity, p["labels"], shard=shard, k=k, chunk=chunk).topk_ids for chunk in (16, 1024)
        ]
    return found


def dense() -> dict[str, list[Tensor]]:
    from megatron_rl.algorithms.distill import divergence
    from megatron_rl.ops import reference

    p = problem()
    hidden, weight = p["hidden"].requires_grad_(), p["weight"].requires_grad_()
    expected: dict[str, list[Tensor]] = {}

    def case(ids: Tensor, temperature: float) -> list[Tensor]:
        values = [
            *reference.linear_stats(hidden, weight, p["labels"], temperature),
            *reference.listed(hidden, weight, ids, temperature),
        ]
        gradients = torch.autograd.grad(total(*values, p), (hidden, weight))
        return [*(x.detach() for x in values), ids, *gradients]

    student = reference.log_probs(hidden, weight)
    teacher = reference.log_probs(p["teacher_hidden"], p["teacher_weight"])
    for k in KS:
        expected[f"k={k}"] = case(reference.largest(student, k), 0.7)
        expected[f"tied k={k}"] = [reference.largest(TIED, k)] * 2
    for alpha in ALPHAS:
        loss = divergence(student, teacher, alpha)
        gradients = torch.autograd.grad(p["of_logp"] @ loss, (hidden, weight), retain_graph=True)
        expected[f"alpha={alpha}"] = [loss.detach(), *gradients]
    ids = reference.largest(teacher, 5)
    expected["pair"] = case(ids, 1.0)
    expected["pair"] += [
        *reference.listed(p["teacher_hidden"], p["teacher_weight"], ids),
        reference.largest(student, 5),
    ]
    return expected


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_equals_dense(pool: Pool, tp: int) -> None:
    expected = dense()
    answers = pool.run(sharded, tp, tp)
    assert all(answer.keys() == expected.keys() for answer in answers)
    for name, wanted in expected.items():
        # The weight's gradient is the only tensor that is sharded.
        place = {"k": 6, "a": 2, "p": 6, "t": -1}[name[0]]
        for number, want in enumerate(wanted):
            if number == place:
                whole = torch.cat([answer[name][number] for answer in answers])
                assert not whole[VOCABULARY:].any()
                assert (whole[:VOCABULARY] - want).abs().max() < 1e-10, name
                continue
            for answer in answers:
                found = answer[name][number]
                assert found.dtype == want.dtype and found.shape == want.shape
                if found.dtype == torch.int64:
                    assert torch.equal(found, want), name
                else:
                    assert (found - want).abs().max() < 1e-10, (name, number)
