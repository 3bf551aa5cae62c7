"""The run directory: checkpoints, manifests, lock, logs, and every write to the disk."""
