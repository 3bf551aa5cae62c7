"""The benchmarks, one a file; see bench.entry."""
