"""Whether runs, checkpoints and data are what was written: digests, loading, reading."""
