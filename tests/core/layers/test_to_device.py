"""Arrays become tensors of the same numbers, whatever their layout in memory."""

import numpy as np
import pytest
import torch

from critic_train.layers.to_device import to_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_numbers_and_types_are_kept(dtype):
    array = np.arange(12, dtype=dtype).reshape(3, 4)
    for layout in (array, array.T, array[:, ::2], array[:0]):
        tensor = to_device(layout, CPU)
        assert tensor.is_contiguous()
        assert tensor.numpy().dtype == dtype
        assert np.array_equal(tensor.numpy(), layout)


def test_what_cannot_be_page_locked_is_copied_all_the_same(monkeypatch):
    """The copy goes to the CPU here: only locking is of the device."""

    class Device(str):
        type = "cuda"

    def refuse(tensor):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    assert to_device(np.arange(3), Device("cpu")).tolist() == [0, 1, 2]
