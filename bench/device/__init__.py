"""The parts of `python -m bench device`, each a module with a `run`; see bench.entries.device."""
