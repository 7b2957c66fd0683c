"""Reading what a run has logged."""
