"""SkyRL's batches, as its `TensorBatch.__reduce__` pickles them."""

import pickle
import sys
import types

import numpy as np
import pytest

MODULE = "skyrl.backends.skyrl_train.training_batch"


@pytest.fixture
def module(monkeypatch):
    for name in ("skyrl", "skyrl.backends", "skyrl.backends.skyrl_train", MODULE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    return sys.modules[MODULE]


def written(module, path, tensors, metadata, *, by_function):
    """A pickle of a TrainingInputBatch: by the function that newer versions name, or by the class itself."""
    state = {
        "batch_dict": {
            name: {"format": "numpy", "data": array.tobytes(), "shape": array.shape, "dtype": str(array.dtype)}
            for name, array in tensors.items()
        },
        "batch_size": len(tensors["sequences"]),
        "device": None,
        "metadata": metadata,
    }

    class TrainingInputBatch(dict):
        def __reduce__(self):
            return (_rebuild_tensor_batch, (type(self), state)) if by_function else (type(self), (), state)

    def _rebuild_tensor_batch(kind, content):
        raise AssertionError("nothing of the file's is called")

    for one in (TrainingInputBatch, _rebuild_tensor_batch):
        one.__module__, one.__qualname__ = MODULE, one.__name__
        setattr(module, one.__name__, one)
    path.write_bytes(pickle.dumps(TrainingInputBatch()))


@pytest.mark.parametrize("by_function", [True, False])
def test_a_batch_field_by_field(tmp_path, converted, module, by_function):
    tensors = {
        "sequences": np.asarray([[0, 0, 5, 6, 7, 8, 9], [5, 5, 6, 7, 8, 9, 3]]),
        "attention_mask": np.asarray([[0, 0, 1, 1, 1, 1, 1], [1] * 7]),
        "response_mask": np.asarray([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "loss_mask": np.asarray([[0, 1, 0, 1], [1, 1, 0, 1]]),
        "values": np.asarray([[0, 0.5, 0, 0.25], [1, 2, 0, 3]], np.float32),
        "returns": np.asarray([[0, 1, 0, 1], [0, 0, 0, 0]], np.float32),
        "action_log_probs": np.zeros((2, 4), np.float32),
    }
    written(module, tmp_path / "a.pkl", tensors, {"uids": ["x", "y"], "global_step": 5}, by_function=by_function)
    done = converted(tmp_path / "a.pkl")
    first, second = done.table.to_pylist()
    assert first["input_ids"] == [5, 6, 7, 8, 9]
    assert first["response_mask"] == [False, False, True, False, True]
    assert first["values"] == [0, 0, 0.5, 0, 0.25]
    assert second["response_mask"] == [False, False, False, True, True, False, True]
    assert [row["uid"] for row in (first, second)] == ["x", "y"]
    assert first["step"] == 5
    assert "`loss_mask` is read as response_mask: it is narrower than `response_mask`" in done.said
    assert "`action_log_probs` is left out" in done.said
