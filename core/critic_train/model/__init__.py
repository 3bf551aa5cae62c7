"""The critic: a transformers trunk on a forest of rollouts, and a float32 value head."""
