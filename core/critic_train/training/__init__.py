"""The loss, the optimizer and the loop that fits a critic."""
