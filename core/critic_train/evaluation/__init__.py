"""`eval`: metrics of critics and baselines, with intervals."""
