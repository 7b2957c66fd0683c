"""A plain forward pass through the pipeline, for tests that look at logits."""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def packed_logits(chunks: list, mesh, tokens: list[list[int]]) -> list[Tensor] | None:
    """Logits [n_i, vocabulary] of each sequence; None on ranks without the end of the pipeline."""
    from megatron_rl.models.attention import packed_seq_params
    from megatron_rl.parallel.schedule import run_schedule

    lengths = [len(sequence) for sequence in tokens]
    padding = -sum(lengths) % mesh.pad_multiple
    borders = torch.tensor([0, *lengths, *([padding] if padding else [])]).cumsum(0).to(torch.int32)
    flat = torch.tensor([token for sequence in tokens for token in sequence] + [0] * padding)[None]
    positions = torch.cat([torch.arange(n) for n in [*lengths, padding]])[None]
    found: list[Tensor] = []

    def step(model, batch):
        hidden = model(flat, positions, None, packed_seq_params=packed_seq_params(borders, max(lengths)))

        def loss(output: Tensor):
            states = output
            if mesh.sequence_parallel:
                pieces = [torch.empty_like(states) for _ in range(mesh.tp_size)]
                dist.all_gather(pieces, states.contiguous(), group=mesh.tp_group)
                states = torch.cat(pieces)
            local = states[:, 0] @ chunks[-1].head_weight().T
            pieces = [torch.empty_like(local) for _ in range(mesh.tp_size)]
            dist.all_gather(pieces, local.contiguous(), group=mesh.tp_group)
            found.append(torch.cat(pieces, dim=1)[:, : chunks[-1].shape.vocab_size])
            return output.sum(), None

        return hidden, loss

    run_schedule(chunks, [None] * mesh.pp_size, step, mesh=mesh, forward_only=True)
    return None if not found else list(found[0][: sum(lengths)].split(lengths))
