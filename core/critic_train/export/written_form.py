"""Change a model directory that was just written: the names of its tensors, and its configuration."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from critic_train.jsonio import read_json_object
from critic_train.run.storage import library_writes, write_json

INDEX = "model.safetensors.index.json"


def rename_tensors(directory: Path, new_name: Callable[[str], str | None]) -> None:
    """Give tensors other names; files in which none changes are left as they are.

    Args:
        directory: with model*.safetensors, and an index where there are several.
        new_name: name -> another, or the same, or None for a tensor that is left out.

    Raises:
        OSError: the disk is full or not writable.
    """
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata()
        renamed = {name: new_name(name) for name in names}
        if all(name == other for name, other in renamed.items()):
            continue
        tensors = load_file(file)
        remaining = {other: tensors[name] for name, other in renamed.items() if other is not None}
        with library_writes(file):
            save_file(remaining, file, metadata)
    if (directory / INDEX).is_file():
        index = read_json_object(directory / INDEX)
        weight_map = {new_name(name): file for name, file in index["weight_map"].items()}
        index["weight_map"] = {name: file for name, file in weight_map.items() if name is not None}
        write_json(directory / INDEX, index)


def read_tensors(directory: Path, names: set[str]) -> dict[str, Tensor]:
    """Those of the named tensors that a directory holds."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in names & set(opened.keys())}
    return tensors


def tensor_names(directory: Path) -> set[str]:
    """The names of all tensors of a directory."""
    names: set[str] = set()
    for file in directory.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    return names


def edit_config(directory: Path, **entries: Any) -> None:
    """Set entries of config.json; None removes one."""
    config = read_json_object(directory / "config.json") | entries
    write_json(directory / "config.json", {name: value for name, value in config.items() if value is not None})
