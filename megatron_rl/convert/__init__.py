"""Checkpoints between Hugging Face's format and Megatron's, tensor by tensor, without building a model."""
