"""Trainers: each a `build` and a `step` on one screen; `run` carries them."""
