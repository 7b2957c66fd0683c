"""Measurements as rows: each beside a named baseline and a limit, written to a file, and held against an older one."""
