"""The command `show`: rollouts or a text, token by token, with the value of each state."""
