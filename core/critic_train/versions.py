"""Versions of the program and its libraries, for records."""

import importlib.metadata
import platform

from critic_train import __version__


def versions() -> dict[str, str]:
    """Name -> version, of this program, of Python and of the libraries that a result depends on."""
    names = ("torch", "transformers", "pyarrow", "numpy", "safetensors")
    return {
        "critic-train": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
