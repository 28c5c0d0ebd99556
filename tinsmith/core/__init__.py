"""Shared basics without neural networks: errors, files, parsing, random states, logs, signals."""
