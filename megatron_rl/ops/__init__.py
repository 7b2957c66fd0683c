"""Operators along the vocabulary axis: exact for any number of shards, and never a whole row of logits at once."""
