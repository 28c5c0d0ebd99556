"""Folders that others open, and opening theirs."""
