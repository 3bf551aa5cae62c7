#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0 and 4.46.3.
#
# A model whose rotary base is not 10000 (Llama 3: 500000, Qwen: 1000000, SmolLM2: 100000) is saved with transformers 5 and
# loaded with transformers 4. It loads without a warning and computes something else: transformers 5 writes the base as
# rope_parameters alone, which transformers 4 keeps as an unknown field while it takes its default of 10000. The weights are
# the same. With "rope_theta" added to config.json both versions compute the same.
#
# Output seen:
#   transformers 4.46.3 reads rope_theta 10000.0 where 1000000.0 was saved; hidden states differ by 0.021
#   with "rope_theta" in config.json: 1000000.0, they differ by 0.000
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 5.23.0 4.46.3; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 "transformers==$version"
done
"$folder/5.23.0/bin/python" - "$folder/model" <<'PYTHON'
import sys

import torch
from transformers import AutoModel, LlamaConfig

torch.manual_seed(0)
shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
rope = {"rope_type": "default", "rope_theta": 1e6}
model = AutoModel.from_config(LlamaConfig(**shape, vocab_size=100, rope_parameters=rope)).eval()
with torch.no_grad():
    torch.save(model(torch.arange(1, 33)[None]).last_hidden_state, sys.argv[1] + ".pt")
model.save_pretrained(sys.argv[1])
PYTHON
"$folder/4.46.3/bin/python" - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModel

expected = torch.load(sys.argv[1] + ".pt")


def loaded():
    model = AutoModel.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
    with torch.no_grad():
        difference = (model(torch.arange(1, 33)[None]).last_hidden_state - expected).abs().max()
    return model.config.rope_theta, float(difference)


base, difference = loaded()
print(f"transformers {transformers.__version__} reads rope_theta {base} where 1000000.0 was saved; "
      f"hidden states differ by {difference:.3f}")
file = Path(sys.argv[1], "config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 1e6}))
repaired = loaded()
print(f'with "rope_theta" in config.json: {repaired[0]}, they differ by {repaired[1]:.3f}')
assert base == 1e4 and difference > 0.01
assert repaired[0] == 1e6 and repaired[1] < 1e-4
PYTHON
