"""Models: from a Hugging Face config to megatron-core's GPTModel, and the map between their weights."""
