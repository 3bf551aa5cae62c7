"""One part of the device benchmark in a process of its own: `python -m bench.device NAME [--quick]`."""

import importlib
import sys

import torch

if __name__ == "__main__":
    torch.set_num_threads(max(1, torch.get_num_threads()))
    importlib.import_module(f"bench.device.{sys.argv[1]}").run("--quick" in sys.argv)
