"""From rows on disk to packed micro-batches."""
