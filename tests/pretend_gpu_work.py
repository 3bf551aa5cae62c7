"""What tests on the pretended GPU share: whether there is one, and what a process forked for a walk does first."""

import ctypes
import importlib
import runpy
import sys
from pathlib import Path

import pytest

PATCHED = Path(__file__).parent / "pretend_gpu" / "patched"


def accept_values() -> None:
    """Let comparisons of values pass, here and in the ranks that this process starts: all are 0 on such a device."""
    for name, patch in runpy.run_path(str(PATCHED / "sitecustomize.py"))["PATCHES"].items():
        patch(importlib.import_module(name))
    sys.path.insert(0, str(PATCHED))


def is_pretended() -> bool:
    """Whether this process's CUDA is the stand-in."""
    try:
        return hasattr(ctypes.CDLL("libcudart.so.13"), "pretended_name")
    except OSError:
        return False


ON_THE_PRETENDED_GPU = [
    pytest.mark.pretend_gpu,
    pytest.mark.skipif(not is_pretended(), reason="needs an environment made by tests/pretend_gpu/build.py"),
]
"""The marks of a file of such tests."""
