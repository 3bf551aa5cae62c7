"""Whether a critic is any good: metrics, intervals, baselines."""
