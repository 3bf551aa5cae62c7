"""A file written tensor by tensor is the library's, byte for byte."""

import torch
from safetensors.torch import save_file

from critic_train.model_files.tensor_file import write_tensors


def test_a_file_written_tensor_by_tensor_is_the_librarys(tmp_path):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "b.weight": torch.randn(3, 5, generator=draw),
        "a": torch.randn(7, generator=draw).to(torch.bfloat16),
        "step": torch.tensor([3.0]),
        "é": torch.arange(4),
        "none": torch.zeros(0, 4),
    }
    for name, metadata in (("with", {"format": "pt"}), ("without", None)):
        save_file(tensors, tmp_path / name, metadata=metadata)
        write_tensors(tmp_path / f"{name}-ours", tensors, tensors.__getitem__, metadata)
        assert (tmp_path / f"{name}-ours").read_bytes() == (tmp_path / name).read_bytes()
