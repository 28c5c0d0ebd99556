"""From token shards to batches: order of samples, mixtures, packing."""
