"""One file a command: what it is called, what it takes, what it does."""
