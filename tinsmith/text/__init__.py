"""Tokenizers, chat templates, chat records and text streaming."""
