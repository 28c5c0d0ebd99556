"""Models at work: sampling, the engine over ragged rows, stop conditions."""
