#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# With rope_type "longrope" (Phi-3.5, Phi-4-mini) transformers takes one of two lists of rotary factors for a whole forward
# pass: the long one as soon as any row of the batch is longer than original_max_position_embeddings, the short one
# otherwise. So the hidden states of a short row, right-padded and masked, depend on whether a longer row stands beside
# it. A value model's values then change with the batch they are computed in; with packed rows likewise.
#
# Output seen:
#   hidden states of a row of 16 tokens beside a row of 32 tokens differ by 0.0e+00 from those of the row alone
#   hidden states of a row of 16 tokens beside a row of 48 tokens differ by 4.6e-02 from those of the row alone
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModel, Phi3Config
from transformers.utils import logging

logging.set_verbosity_error()
ORIGINAL = 32
rope = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": ORIGINAL,
}
config = Phi3Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
    original_max_position_embeddings=ORIGINAL, rope_parameters=rope,
)  # fmt: skip
torch.manual_seed(0)
model = AutoModel.from_config(config).eval()
row = torch.randint(3, 100, (16,))


@torch.no_grad()
def beside(length):
    """The largest difference between the row's hidden states alone and in a batch with one of `length` tokens."""
    tokens = torch.zeros(2, length, dtype=torch.long)
    tokens[0, :16], tokens[1] = row, torch.randint(3, 100, (length,))
    mask = torch.ones_like(tokens)
    mask[0, 16:] = 0
    alone = model(row[None]).last_hidden_state[0]
    batched = model(tokens, attention_mask=mask).last_hidden_state[0, :16]
    difference = float((alone - batched).abs().max())
    print(f"hidden states of a row of 16 tokens beside a row of {length} tokens differ by {difference:.1e} "
          "from those of the row alone")  # fmt: skip
    return difference


assert beside(ORIGINAL) < 1e-5
assert beside(ORIGINAL + 16) > 1e-3
PYTHON
