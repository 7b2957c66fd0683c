"""Self-distillation of a whole model in bfloat16: the ids that the loss is taken over hardly depend on the layout."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rl.ops.divergence import overlap
from tests.dist.pool import Pool

VOCABULARY, HIDDEN, LAYERS = 4096, 128, 4
SEQUENCES, RESPONSE = 24, 64
KS = (1, 20, 100)


def language_model(directory: Path, seed: int) -> str:
    """16 successors of each token are likely, by Zipf's law, and all others by noise: 1.6 nats, logits spread by 3.6.

    The layers are random, and what they add to the residual stream is divided by sqrt(2 layers), as it is initially.
    """
    from transformers import AutoModelForCausalLM, Qwen3Config

    draw = torch.Generator().manual_seed(seed)
    language = torch.Generator().manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            fan_in = parameter.shape[-1]
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else noise / (2 * LAYERS * fan_in) ** 0.5)
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.randn(embedding.shape, generator=language))
        head.copy_(torch.randn(head.shape, generator=draw) / HIDDEN**0.5)
        for rank in torch.arange(1.0, 17.0):
            head[torch.randperm(VOCABULARY, generator=language)] += (12 - 1.2 * rank.log()) * embedding / HIDDEN
    model.to(torch.bfloat16).save_pretrained(directory)
    return str(directory)


def distilled(student: str, teacher: str, layout: dict, dtype: str) -> tuple[dict[int, tuple[float, Tensor]], Tensor]:
    """By k the loss and its ids [tokens, k], as the training pass chose them; and the tokens' hidden states."""
    from megatron_rl.config.schema import DType, ModelConfig, OptimConfig
    from megatron_rl.config.sdpo import TeacherConfig, TeacherMode
    from megatron_rl.data.collate import scatter_back
    from megatron_rl.data.samples import from_example, weighed_targets
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.workers.distillation import Distillation
    from megatron_rl.workers.model_worker import ModelWorker
    from megatron_rl.workers.teacher import Teacher

    chosen: dict[int, Tensor] = {}

    class Recorded(Distillation):
        def _divergence(self, tokens: Any) -> Any:
            found = super()._divergence(tokens)
            chosen.update(scatter_back(found[1].student.topk_ids, tokens.batch))
            return found

    mesh = create_mesh(**layout)
    actor = ModelWorker(ModelConfig(path=student, dtype=DType(dtype)), OptimConfig(), mesh, total_steps=1)
    reader = Teacher(ModelConfig(path=teacher, dtype=DType(dtype)), TeacherConfig(mode=TeacherMode.frozen), actor)
    draw = torch.Generator().manual_seed(3)
    prompts, responses = (torch.randint(0, VOCABULARY, (SEQUENCES, n), generator=draw).tolist() for n in (8, RESPONSE))
    sequences = [from_example(i, *both) for i, both in enumerate(zip(prompts, responses))]
    samples = weighed_targets(sequences, [1.0] * SEQUENCES, "token-mean")
    plan = actor.plan(samples, 512)
    targets, _ = reader.targets(samples, plan, 512)
    found = {}
    for k in KS:
        objective = Recorded(
            targets=targets,
            support="student",
            topk=k,
            alpha=0.5,
            tail="exact",
            sampled=False,
            is_clip=None,
            corrected=False,
            temperature=1.0,
            on_policy=True,
        )
        loss = actor.forward_backward(samples, plan, objective)["actor/distill_loss"].result()
        found[k] = loss, torch.cat([chosen[i] for i in range(SEQUENCES)])
    hidden = actor.final_hidden(samples, plan)
    return found, torch.cat([hidden[i] for i in range(SEQUENCES)]).float()


@pytest.mark.full
@pytest.mark.parametrize("sizes", [(1, 2), (1, 2, 4)])
def test_the_ids_of_a_bfloat16_model(pool: Pool, tmp_path: Path, record_property: Any, sizes: tuple[int, ...]) -> None:
    """99% of them are the same under every tensor-parallel size. If float32 lists others, logits are almost equal."""
    from transformers import AutoModelForCausalLM

    student, teacher = (language_model(tmp_path / name, seed) for seed, name in enumerate(("student", "teacher")))
    exact, hidden = pool.run(distilled, 1, student, teacher, {}, "float32")[0]
    rounded = {tp: pool.run(distilled, tp, student, teacher, {"tp": tp}, "bfloat16")[0][0] for tp in sizes}
    head = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).lm_head.weight.detach()
    logits = hidden @ head.t()
    logp = logits.log_softmax(1)
    assert logits.std(1).mean() == pytest.approx(3.6, abs=0.1)
    assert -(logp.exp() * logp).sum(1).mean() == pytest.approx(1.6, abs=0.1)
    for k in KS:
        wide_loss, wide = exact[k]
        nearly = 1e-2 if k == 1 else 2e-3  # one id that is another moves the loss more than one of twenty
        assert wide.shape == (SEQUENCES * RESPONSE, k)
        for tp, other in combinations(sizes, 2):
            (loss, ids), (other_loss, others) = rounded[tp][k], rounded[other][k]
            share, apart = float(overlap(ids, others).mean()), abs(loss - other_loss) / loss
            record_property(f"k={k} tp={tp},{other}", f"overlap {share:.4f}, loss {apart:.1e}")
            assert share >= 0.99 and apart < nearly
        last = logits.gather(1, wide)[:, -1:]
        for tp, (loss, ids) in ((tp, found[k]) for tp, found in rounded.items()):
            share, apart = float(overlap(wide, ids).mean()), abs(loss - wide_loss) / wide_loss
            behind = float((last - logits.gather(1, ids)).max())
            record_property(f"k={k} float32, tp={tp}", f"overlap {share:.4f}, loss {apart:.1e}, behind {behind:.3f}")
            assert share >= 0.98 and apart < nearly
            # From 8 to 16 a bfloat16 has steps of 1/16, and above that of 1/8.
            assert behind < 0.25
