"""The head's gradient, which the vocabulary operator adds to `main_grad` under megatron-core's protocol."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.dist.test_invariance import make_samples, objective
from tests.dist.test_worker import make_worker
from tests.models import tiny_model

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp1": (1, {}),
    "tp2_sp": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
}
MAX_TOKENS = 48  # which makes several micro-batches


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", tied=request.param == "tied"))


def overlapping(worker: Any, index: int, chunk: Any) -> Any:
    """A wrap that reduces gradients bucket by bucket during the backward pass."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=20_000
    )
    wrapped = DistributedDataParallel(worker.config, ddp, chunk)
    assert len(wrapped.buffers[0].buckets) > 3
    return wrapped


def by_autograd(parameter: Tensor) -> tuple[Tensor, None]:
    """Stands in for `with_main_grad`: the operator returns the weight's gradient, and DDP's hook adds it."""
    return parameter, None


def measure(directory: str, layout: dict, dtype: str, added: bool, overlap: bool = False) -> dict[str, Tensor]:
    """The gradients, summed over every axis. `added`: by the operator itself."""
    import megatron_rl.workers.objective as module
    from megatron_rl.workers.model_worker import ModelWorker

    samples = make_samples("token-mean")
    with pytest.MonkeyPatch.context() as patch:
        if not added:
            patch.setattr(module, "with_main_grad", by_autograd)
        if overlap:
            patch.setattr(ModelWorker, "_wrap", overlapping)
        worker = make_worker(directory, layout, dtype)
        plan = worker.plan(samples, MAX_TOKENS)
        assert len(plan.micro_batches[0]) > 1
        worker.forward_backward(samples, plan, objective("grpo"))
    if worker.mesh.is_last_stage:
        weight: Any = worker.models[-1].head_weight()
        assert weight.grad is None and weight.main_grad.dtype == torch.float32
        assert weight.grad_added_to_main_grad == added
        assert not weight.main_grad[worker.models[-1].shard.size :].any()
    return {name: gradient.clone() for name, gradient in worker.named_hf_gradients()}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of a parameter's gradient, relative to its largest number."""
    assert found.keys() == expected.keys() and all(gradient.any() for gradient in expected.values())
    return max(float((found[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


# The overlapping reduction below is one over dp2 as well.
@pytest.mark.parametrize("layout", ["tp1", "tp2_sp", "pp2", pytest.param("dp2", marks=pytest.mark.full)])
def test_gradients_are_those_of_autograd(pool: Pool, model: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    expected = pool.run(measure, world, model, options, "float32", False)[0]
    for found in pool.run(measure, world, model, options, "float32", True):
        assert apart(found, expected) < 1e-6


@pytest.mark.parametrize("layout", ["tp1", pytest.param("pp2", marks=pytest.mark.full)])
def test_in_bfloat16_they_are_nearer_to_float32(pool: Pool, model: str, layout: str) -> None:
    """Within what bfloat16 rounds by; of the rest of the model, the same bits."""
    world, options = LAYOUTS[layout]
    expected, found = (pool.run(measure, world, model, options, "bfloat16", added)[0] for added in (False, True))
    head = "lm_head.weight" if "lm_head.weight" in found else "model.embed_tokens.weight"
    assert all(torch.equal(found[name], expected[name]) for name in found.keys() - {head})
    assert apart({head: found[head]}, {head: expected[head]}) < 2**-7


def test_gradients_that_are_reduced_on_the_way(pool: Pool, model: str) -> None:
    """The hook runs once the operator has added its part, and counts the head's bucket."""
    world, options = LAYOUTS["dp2"]
    expected = pool.run(measure, world, model, options, "float32", False)[0]
    for found in pool.run(measure, world, model, options, "float32", True, overlap=True):
        assert apart(found, expected) < 1e-6


def embedding_gradients(directory: str, layout: dict, sparse: bool) -> dict[str, Tensor]:
    """All gradients, with the package's embedding or megatron-core's own."""
    from megatron_rl.models.embedding import Embedding
    from megatron_rl.workers import objective as module

    with pytest.MonkeyPatch.context() as patch:
        if not sparse:
            patch.setattr(Embedding, "take", lambda embedding: None)
            patch.setattr(module, "with_main_grad", by_autograd)
        worker = make_worker(directory, layout)
        if worker.mesh.pp_rank == 0:
            assert isinstance(worker.models[0].embedding.word_embeddings, Embedding) == sparse
        samples = make_samples("token-mean")
        worker.forward_backward(samples, worker.plan(samples, MAX_TOKENS), objective("grpo"))
    return {name: gradient.clone() for name, gradient in worker.named_hf_gradients()}


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2"])
def test_the_embeddings_gradient_is_that_of_megatron_core(pool: Pool, model: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    expected, found = (pool.run(embedding_gradients, world, model, options, sparse)[0] for sparse in (False, True))
    assert apart(found, expected) < 1e-6


def head_alone(directory: str, twice: bool) -> tuple[Tensor, Tensor, list[torch.Size]]:
    """The head's gradient from one or two operators on it in a backward pass, the dense one, and autograd's shapes."""
    from megatron_rl.models.main_grad import with_main_grad
    from megatron_rl.ops.linear_stats import linear_stats

    worker = make_worker(directory, {})
    model = worker.models[0]
    worker.chunks[0].zero_grad_buffer()
    torch.use_deterministic_algorithms(True)  # tensors are NaN that nobody fills
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, model.shape.hidden_size, generator=generator)
    labels = torch.arange(7)
    head = model.head_weight()
    autograd: list[Tensor] = []
    head.register_hook(lambda gradient: autograd.append(gradient.clone()))
    for _ in range(2):  # micro-batches
        losses = []
        for _ in range(1 + twice):
            weight, main_grad = with_main_grad(head)
            losses.append(linear_stats(hidden, weight, labels, shard=model.shard, main_grad=main_grad).logp.sum())
        sum(losses).backward()
    dense = head.detach().clone().requires_grad_()
    logits = (hidden @ dense.T)[:, : model.shape.vocab_size]
    (2 * (1 + twice) * logits.log_softmax(-1).gather(1, labels[:, None]).sum()).backward()
    torch.use_deterministic_algorithms(False)
    assert head.grad is None and head.grad_added_to_main_grad
    with torch.no_grad():
        weight, main_grad = with_main_grad(head)
        assert weight is head and main_grad is None
    assert getattr(head, "zero_out_wgrad", False) == model.shape.tied
    assert all(gradient.is_sparse and not gradient._nnz() for gradient in autograd)
    return head.main_grad.clone(), dense.grad, [gradient.shape for gradient in autograd]


@pytest.mark.parametrize("twice", [False, True])
def test_each_use_adds_its_part(pool: Pool, model: str, twice: bool) -> None:
    """Over micro-batches, and over two uses in one backward pass. Where it is tied, the embedding had no part in it."""
    ((found, expected, shapes),) = pool.run(head_alone, 1, model, twice)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert shapes == [expected.shape] * 2
