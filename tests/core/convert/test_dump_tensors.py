"""What torch, numpy and pickle write is read as it was."""

import pickle

import numpy as np
import pytest
import torch
from guarded import ARRAYS, PLAIN, TENSORS, read, same


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_and_arrays_of_any_protocol(tmp_path, protocol):
    value = PLAIN | ARRAYS
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol=protocol))
    expected = value | {"ordered": {"a": 1}, "default": {"k": [1]}}
    assert same(read(tmp_path / "a.pkl"), expected)


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_and_all_else_that_torch_saves(tmp_path, protocol):
    value = {**TENSORS, "twice": [TENSORS["sliced"]] * 2, "scalar": np.float64(2.5), **ARRAYS}
    torch.save(value, tmp_path / "a.pt", pickle_protocol=protocol)
    assert same(read(tmp_path / "a.pt"), value | {"scalar": 2.5})


def test_sets_sizes_and_nested_tensors(tmp_path):
    ragged = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)])
    torch.save({"set": {1, "a"}, "size": torch.Size([2, 3]), "ragged": ragged}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert (found["set"], found["size"]) == ({1, "a"}, (2, 3))
    assert same(found["ragged"], [torch.arange(3), torch.arange(5)])
