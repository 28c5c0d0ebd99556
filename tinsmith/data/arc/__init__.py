"""Grid puzzles of ARC-AGI: grids, generators, and their encoding as tokens."""
