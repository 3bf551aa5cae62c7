"""From shards on disk to rollouts in memory: finding, decoding, checking, ordering."""
