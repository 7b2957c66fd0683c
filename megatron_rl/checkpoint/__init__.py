"""State on disk: Hugging Face directories, and checkpoints that a run continues from."""
