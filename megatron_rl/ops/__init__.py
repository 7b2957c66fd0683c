"""Operators along the vocabulary axis, exact for any number of shards and never with all logits at once; scans and
means along tokens; averages of weights. Each is defined in torch, and has kernels for GPUs in `triton`."""
