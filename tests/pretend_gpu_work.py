"""What a process forked for a walk on the pretended GPU does before it is the program."""

import importlib
import runpy
import sys
from pathlib import Path

PATCHED = Path(__file__).parent / "pretend_gpu" / "patched"


def accept_values() -> None:
    """Let comparisons of values pass, here and in the ranks that this process starts: all are 0 on such a device."""
    for name, patch in runpy.run_path(str(PATCHED / "sitecustomize.py"))["PATCHES"].items():
        patch(importlib.import_module(name))
    sys.path.insert(0, str(PATCHED))
