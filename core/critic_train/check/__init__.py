"""What is in a data set, what is wrong with it, and how to train on it."""
