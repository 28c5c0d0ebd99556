"""Raw files to shards to batches; the order of samples is a pure function of (seed, index)."""
