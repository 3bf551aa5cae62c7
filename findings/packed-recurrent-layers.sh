#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# Two sequences in one row whose position ids start anew: for attention transformers finds the border in the position ids and
# keeps them apart, as packed training expects. Recurrent layers and short convolutions of the same model do not look at
# position ids: the second sequence starts from the first one's state, and nothing is said. Borders under flash attention's
# names, cu_seq_lens_q and cu_seq_lens_k, are refused by Qwen3.5 where flash-linear-attention is missing, but Granite-4-h and
# LFM2 do not read them and leak all the same; they listen to seq_idx.
#
# Output seen (largest difference of the second sequence's hidden states to those it has alone, relative to the largest):
#   qwen3: position ids 3.3e-07, cu_seq_lens 3.3e-07, seq_idx 3.3e-07
#   qwen3_5_text: position ids 9.8e-01, cu_seq_lens refused, seq_idx refused
#   granitemoehybrid: position ids 1.2e+00, cu_seq_lens 1.2e+00, seq_idx refused
#   lfm2: position ids 6.7e-01, cu_seq_lens 6.7e-01, seq_idx refused
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModel, GraniteMoeHybridConfig, Lfm2Config, Qwen3_5TextConfig, Qwen3Config
from transformers.utils import logging

logging.set_verbosity_error()
shape = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
linear = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
mamba = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_expand=2, num_local_experts=0)
configs = [
    Qwen3Config(**shape, head_dim=16),
    Qwen3_5TextConfig(**shape, **linear, head_dim=16, layer_types=["linear_attention", "full_attention"]),
    GraniteMoeHybridConfig(**shape, **mamba, layer_types=["mamba", "attention"]),
    Lfm2Config(**shape, layer_types=["conv", "full_attention"]),
]
LENGTH = 12
bounds = torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32)
told = {
    "position ids": {},
    "cu_seq_lens": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
    "seq_idx": {"seq_idx": torch.tensor([[0] * LENGTH + [1] * LENGTH], dtype=torch.int32)},
}
seen = {}
for config in configs:
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.mul_(5)
        first, second = torch.randint(3, 100, (2, 1, LENGTH))
        alone = model(second, use_cache=False).last_hidden_state[0]
        row = {"input_ids": torch.cat([first, second], 1), "position_ids": torch.arange(LENGTH).repeat(2)[None]}
        for name, more in told.items():
            try:
                packed = model(**row, **more, use_cache=False).last_hidden_state[0, LENGTH:]
                answer = f"{float((packed - alone).abs().max() / alone.abs().max()):.1e}"
            except ValueError as error:
                assert "can't keep packed sequences apart" in str(error)
                answer = "refused"
            seen[config.model_type, name] = answer
    print(f"{config.model_type}: " + ", ".join(f"{name} {seen[config.model_type, name]}" for name in told))

assert float(seen["qwen3", "position ids"]) < 1e-5
for kind in ("qwen3_5_text", "granitemoehybrid", "lfm2"):
    assert float(seen[kind, "position ids"]) > 0.1
assert seen["qwen3_5_text", "cu_seq_lens"] == "refused"
assert float(seen["granitemoehybrid", "cu_seq_lens"]) > 0.1
assert float(seen["lfm2", "cu_seq_lens"]) > 0.1
PYTHON
