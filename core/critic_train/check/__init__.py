"""The content of a data set, its errors, and the flags to train on it."""
