"""Triton versions of hot paths, each beside its plain twin in `nn/parts` and equal to it."""
