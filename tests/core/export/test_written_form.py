"""Tensors renamed and left out, in one file and in several; entries of config.json."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_critics import config_of, tensors_of

from critic_train.export.written_form import edit_config, read_tensors, rename_tensors, tensor_names


def directory(folder):
    """Two files and their index."""
    files = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    for file, names in files.items():
        save_file({name: torch.full((2,), float(ord(name))) for name in names}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_names_change_in_files_and_index(tmp_path):
    folder = directory(tmp_path)
    untouched = folder / "model-00002-of-00002.safetensors"
    before = (untouched.read_bytes(), untouched.stat().st_ino)
    rename_tensors(folder, lambda name: {"a": "x.a", "b": None}.get(name, name))
    assert tensor_names(folder) == {"x.a", "c"}
    assert tensors_of(folder)["x.a"].tolist() == [97.0, 97.0]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"x.a": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"}
    assert (untouched.read_bytes(), untouched.stat().st_ino) == before
    with safe_open(folder / "model-00001-of-00002.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "transformers refuses files without it"


def test_named_tensors_are_read_from_whichever_file(tmp_path):
    assert {name: t.tolist() for name, t in read_tensors(directory(tmp_path), {"b", "c", "d"}).items()} == {
        "b": [98.0, 98.0],
        "c": [99.0, 99.0],
    }


def test_entries_are_set_and_removed(tmp_path):
    (tmp_path / "config.json").write_text('{"kept": 1, "gone": 2}')
    edit_config(tmp_path, gone=None, new=[3])
    assert config_of(tmp_path) == {"kept": 1, "new": [3]}
