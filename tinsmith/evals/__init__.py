"""Evaluations: bits per byte, multiple choice, ARC puzzles, output format, routing statistics."""
