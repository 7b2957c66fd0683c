"""Workers: one Megatron model each, and the objectives they are trained on."""
