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
