"""What is measured: figures that merge exactly, seconds per phase, and where both are written."""
