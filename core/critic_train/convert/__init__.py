"""From other systems' rollout dumps to canonical shards: one file a format."""
