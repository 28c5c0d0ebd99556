"""Attention kernels, spans, caches, rotary embeddings and sparse selection."""
