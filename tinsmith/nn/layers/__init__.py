"""Norms, initialisation and top-k selection."""
