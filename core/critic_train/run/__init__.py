"""The run directory: checkpoints that exist whole or not at all, the lock, the logs."""
