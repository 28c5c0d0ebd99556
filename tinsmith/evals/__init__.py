"""Models measured: bits per byte, multiple choice."""
