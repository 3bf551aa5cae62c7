"""`predict`: a critic's values written into the shards."""
