"""The loss of supervised fine-tuning against a dense computation in transformers, from rows to gradients."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.dist.pool import Pool
from tests.models import tiny_model, tiny_tokenizer

CONFIG = """
trainer: sft
model: {{path: {folder}}}
data: {{train: {folder}/train.jsonl}}
train: {{steps: 1, batch_size: 5}}
run: {{dir: none}}
"""
# Prompts and responses in words; word w5 is token 5, and token 2 ends a response.
ROWS = [("w5 w6 w7", "w8 w9"), ("w10", ""), ("w11 w12", "w13 w14 w15 w16 w17"), ("w8 w9", "w8"), ("w20", "w21 w22")]
AGGREGATIONS = {
    "token-mean": [],
    "seq-mean-token-mean": ["train.aggregation=seq-mean-token-mean"],
    "seq-mean-token-sum-norm": ["train.aggregation=seq-mean-token-sum-norm", "train.normalizer=2.5"],
}
Found = tuple[dict[str, float], dict[str, Tensor]]


def gradients(config: str, budget: int) -> dict[str, Found]:
    """By aggregation: the update's figures, and its gradient by Hugging Face name."""
    from megatron_rl.config.load import load_config
    from megatron_rl.data.samples import from_demonstration
    from megatron_rl.parallel.mesh import create_mesh
    from megatron_rl.trainers.data import train_demonstrations
    from megatron_rl.trainers.likelihood import weighed_by
    from megatron_rl.trainers.parts import Parts
    from megatron_rl.workers.model_worker import ModelWorker
    from megatron_rl.workers.objective import NegativeLogLikelihood

    found = {}
    plain = load_config(config)
    worker = ModelWorker(plain.model, plain.optim, create_mesh(), total_steps=1)
    for name, overrides in AGGREGATIONS.items():
        loaded = load_config(config, overrides)
        parts = Parts(loaded)
        drawn = train_demonstrations(loaded, parts.tokenizer, parts.stop).all()
        samples = weighed_by(loaded, [from_demonstration(i, shown) for i, shown in enumerate(drawn)])
        metrics = worker.forward_backward(samples, worker.plan(samples, budget), NegativeLogLikelihood())
        named = {key: value.float().clone() for key, value in worker.named_hf_gradients()}
        found[name] = {key: value.result() for key, value in metrics.items()}, named
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_model(tmp_path_factory.mktemp("sft"))
    tiny_tokenizer(folder, 99)
    rows = [json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in ROWS]
    (folder / "train.jsonl").write_text("".join(rows))
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder))
    return folder


def reference(folder: Path, aggregation: str) -> tuple[float, float, float, dict[str, Tensor]]:
    """Loss, mean nll, mean entropy, gradients: one padded batch, every token of it scored, and a mask over them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompts, responses = ([[int(w[1:]) for w in row[side].split()] for row in ROWS] for side in (0, 1))
    responses = [[*ids, 2] for ids in responses]
    length = max(len(a) + len(b) for a, b in zip(prompts, responses))
    tokens, mask = torch.zeros(len(ROWS), length, dtype=torch.int64), torch.zeros(len(ROWS), length)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        tokens[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
        mask[row, len(prompt) : len(prompt) + len(response)] = 1
    log_probs = torch.log_softmax(model(tokens).logits[:, :-1], dim=-1)
    labels, mask = tokens[:, 1:], mask[:, 1:].double()
    nll = -log_probs.gather(2, labels[..., None])[..., 0] * mask
    entropy = -(log_probs.exp() * log_probs).sum(-1) * mask
    loss = {
        "token-mean": nll.sum() / mask.sum(),
        "seq-mean-token-mean": (nll.sum(1) / mask.sum(1)).mean(),
        "seq-mean-token-sum-norm": (nll.sum(1) / 2.5).mean(),
    }[aggregation]
    loss.backward()
    slopes = {name: parameter.grad for name, parameter in model.named_parameters()}
    count = float(mask.sum())
    means = [float(values.detach().sum()) / count for values in (nll, entropy)]
    return loss.item(), *means, slopes


def test_the_loss_is_that_of_a_dense_model(pool: Pool, folder: Path) -> None:
    """However micro-batches are cut. An empty response teaches to stop, and nothing else."""
    config = str(folder / "config.yaml")
    for budget in (4096, 8):
        found = pool.run(gradients, 1, config, budget)[0]
        for aggregation in AGGREGATIONS:
            loss, nll, entropy, expected = reference(folder, aggregation)
            figures, named = found[aggregation]
            assert figures["sft/loss"] == pytest.approx(loss, rel=1e-5)
            assert figures["sft/nll"] == pytest.approx(nll, rel=1e-5)
            assert figures["actor/entropy"] == pytest.approx(entropy, rel=1e-5)
            for name, slope in expected.items():
                assert (named[name] - slope).abs().max() < 1e-5 * slope.abs().max(), (aggregation, budget, name)
