"""A critic's values written back to the shards: predict, keep, write."""
