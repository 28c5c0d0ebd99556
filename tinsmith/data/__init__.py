"""Raw files to shards, shards to batches; the order of samples is a pure function of (seed, index)."""
