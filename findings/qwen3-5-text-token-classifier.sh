#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# Qwen3.5 directories as published have model type qwen3_5, for which transformers has a token classifier. Opened with
# AutoModelForCausalLM and saved again, as fine-tuning does, the same weights have model type qwen3_5_text, for which it has
# a causal LM and a sequence classifier but no token classifier. A trainer that loads its value model with
# AutoModelForTokenClassification, as verl does, takes the published directory and refuses every fine-tuned one.
#
# Output seen:
#   published: qwen3_5 -> Qwen3_5ForTokenClassification
#   saved again by AutoModelForCausalLM: qwen3_5_text, ['Qwen3_5ForCausalLM']
#   AutoModelForSequenceClassification: Qwen3_5TextForSequenceClassification
#   AutoModelForTokenClassification: ValueError: Unrecognized configuration class
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
FOLDER="$folder" "$folder/env/bin/python" - <<'PYTHON'
import json
import os
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3_5Config,
)
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
folder = Path(os.environ["FOLDER"])
text = dict(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
vision = dict(depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
published = Qwen3_5Config(text_config=text, vision_config=vision, num_labels=1)
classifier = AutoModelForTokenClassification.from_config(published)
print(f"published: {published.model_type} -> {type(classifier).__name__}")

AutoModelForCausalLM.from_config(published).save_pretrained(folder / "again")
again = json.loads((folder / "again/config.json").read_text())
print(f"saved again by AutoModelForCausalLM: {again['model_type']}, {again['architectures']}")
sequence = AutoModelForSequenceClassification.from_pretrained(folder / "again", num_labels=1)
print(f"AutoModelForSequenceClassification: {type(sequence).__name__}")
try:
    AutoModelForTokenClassification.from_pretrained(folder / "again", num_labels=1)
    refusal = ""
except ValueError as error:
    refusal = str(error)
print(f"AutoModelForTokenClassification: ValueError: {refusal[:33].strip()}")

assert type(classifier).__name__ == "Qwen3_5ForTokenClassification"
assert again["model_type"] == "qwen3_5_text"
assert refusal.startswith("Unrecognized configuration class")
PYTHON
