"""From shards on disk to rollouts in memory: finding, understanding, checking, ordering."""
