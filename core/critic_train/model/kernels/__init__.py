"""Ways to compute attention on a forest; each is exact, and none builds a mask over all pairs."""
