"""One part of the device benchmark in a process of its own: `python -m bench.device NAME [--quick]`."""

import importlib
import sys

if __name__ == "__main__":
    importlib.import_module(f"bench.device.{sys.argv[1]}").run("--quick" in sys.argv)
