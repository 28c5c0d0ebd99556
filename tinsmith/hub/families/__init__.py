"""Hugging Face model families, one file each: configs and tensor names in both directions."""
