"""Verification of runs, checkpoints and data: digests, loading, reading."""
