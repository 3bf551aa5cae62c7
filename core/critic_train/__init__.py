"""critic-train: train and judge PPO critics offline, from Parquet rollouts."""

__version__ = "0.1.0"
