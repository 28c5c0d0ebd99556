"""From raw files to token shards: scanning, splitting, encoding."""
