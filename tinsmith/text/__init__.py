"""Bytes to ids and back: tokenizers, chat templates, streaming text."""
