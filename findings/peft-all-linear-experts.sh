#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0, peft 0.21.2.
#
# LoRA with target_modules="all-linear" on a mixture of experts whose experts are one tensor of all experts, as
# transformers 5 keeps them. On Qwen3-MoE the names of dense layers (gate_proj, up_proj, down_proj) are taken for those
# of the experts: the experts get adapters, and the dense layers that were meant get none. On GPT-OSS the experts get
# none. A list of full names of linear layers does the same, so naming layers does not keep the experts out. The
# weights of an adapted expert tensor have a name that no loader knows: merged by hand, or saved with the model's own
# state dict, they are missing for AutoModel, which makes them anew at random.
#
# Output seen:
#   Qwen3-MoE, all-linear: experts adapted, dense layer 0 not
#   Qwen3-MoE, dense layer 0 by full name: experts adapted, dense layer 0 not
#   Qwen3-MoE, the same in a plain module: experts not adapted, dense layer 0 adapted
#   GPT-OSS, all-linear: experts not adapted
#   names of adapted experts: layers.1.mlp.experts.base_layer.base_layer.down_proj
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 peft==0.21.2
"$folder/env/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoModel, GptOssConfig, Qwen3MoeConfig

sizes = dict(
    vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
qwen = Qwen3MoeConfig(
    **sizes, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[0]
)
gpt_oss = GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)


def adapted(model: nn.Module, targets: object) -> tuple[bool, bool, list[str]]:
    """Whether the experts have adapters, whether the dense layer 0 has, and the names of all weights."""
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), model)
    names = [name for name, _ in model.named_parameters()]
    lora = [name for name in names if ".lora_" in name]
    return any("experts" in n for n in lora), any("layers.0.mlp.gate_proj" in n for n in lora), names


def told(experts: bool, dense: bool) -> str:
    return f"experts {'' if experts else 'not '}adapted, dense layer 0 {'adapted' if dense else 'not'}"


dense_names = [f"layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
first = adapted(AutoModel.from_config(qwen), "all-linear")
print(f"Qwen3-MoE, all-linear: {told(*first[:2])}")
second = adapted(AutoModel.from_config(qwen), dense_names)
print(f"Qwen3-MoE, dense layer 0 by full name: {told(*second[:2])}")
plain = nn.Module()
plain.trunk = AutoModel.from_config(qwen)
third = adapted(plain, [f"trunk.{name}" for name in dense_names])
print(f"Qwen3-MoE, the same in a plain module: {told(*third[:2])}")
other = adapted(AutoModel.from_config(gpt_oss), "all-linear")
print(f"GPT-OSS, all-linear: experts {'' if other[0] else 'not '}adapted")
inner = next(name for name in first[2] if name.endswith("base_layer.down_proj"))
print(f"names of adapted experts: {inner}")
assert first[:2] == (True, False)
assert second[:2] == (True, False)
assert third[:2] == (False, True)
assert not other[0]
PYTHON
