"""Pieces that several mixers share: attention itself, caches, rotary tables, norms,
initialisation.
"""
