"""The command line of critic-train: commands, progress display, exit codes. No training logic."""
