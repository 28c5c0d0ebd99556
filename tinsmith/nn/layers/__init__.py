"""Norms, dense networks, initialisation and deterministic top-k selection."""
