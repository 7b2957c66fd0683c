"""The vocabulary axis ends here: operators from hidden states to per-token numbers."""
