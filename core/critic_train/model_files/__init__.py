"""What lies in a model directory: configuration, tensors, heads, and where each tensor belongs in a transformer."""
