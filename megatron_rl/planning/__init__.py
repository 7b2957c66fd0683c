"""What a run will hold in memory, from shapes and the config alone: no process, no tensor, no GPU.

Every function here is pure and counts bytes. docs/cluster.md says what is counted, and how far it was measured.
"""
