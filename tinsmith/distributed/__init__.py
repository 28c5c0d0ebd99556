"""Process groups and DTensor helpers."""
