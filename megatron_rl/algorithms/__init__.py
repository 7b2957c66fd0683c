"""The mathematics of the losses, along the token axis: tensors to tensors, with no knowledge of ranks or configs."""
