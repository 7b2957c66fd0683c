"""Configuration: typed dataclasses, filled from YAML and the command line."""
