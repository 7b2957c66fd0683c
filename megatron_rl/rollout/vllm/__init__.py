"""vLLM as an engine: in the trainer's processes, and as servers beside them."""
