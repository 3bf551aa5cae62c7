#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0; the same with 5.15.0.
#
# A model class of one's own registers a buffer with persistent=False and fills it in __init__, as from a field of its
# configuration. Built directly, the model has the buffer. Loaded with from_pretrained, the buffer holds uninitialised
# memory: transformers 5 builds every model on "meta", where __init__ fills nothing, and allocates afterwards what no file
# holds. Nothing is reported: missing_keys is empty. (A class may fill such buffers in _init_weights.)
#
# Code written for transformers 4, where the buffer was right, gives other numbers in every process. OpenRLHF 0.11.2, which
# requires transformers 5.15.0, keeps the mean and std of its critic's values in such buffers: with
# --reward.normalize_enable all values are arbitrary.
#
# Output seen (the loaded numbers differ from run to run):
#   built: 0.5
#   loaded: [5.2e+16, -1.2e+35, 3.8e+21], missing keys: []
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - "$folder/model" <<'PYTHON'
import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

shape = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


class WithOffset(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.register_buffer("offset", torch.zeros(1), persistent=False)
        self.offset[0] = config.offset
        self.post_init()


built = WithOffset(LlamaConfig(**shape, vocab_size=50, offset=0.5))
print(f"built: {float(built.offset)}")
built.save_pretrained(sys.argv[1])
# Memory that was used before, so that what is allocated next is not a fresh page of zeros.
used = [torch.full((1,), 7.0) for _ in range(10_000)]
del used
loaded, missing = [], None
for _ in range(20):
    model, report = WithOffset.from_pretrained(sys.argv[1], output_loading_info=True)
    loaded.append(float(model.offset))
    missing = sorted(report["missing_keys"])
print(f"loaded: {loaded[:3]}, missing keys: {missing}")
assert float(built.offset) == 0.5 and missing == []
assert all(offset != 0.5 for offset in loaded)
PYTHON
