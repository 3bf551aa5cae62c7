#!/usr/bin/env bash
# torch 2.13.0, transformers 5.23.0.
#
# A Llama configuration without any dropout (attention_dropout 0, no classifier_dropout, no hidden_dropout) makes a token
# classifier with Dropout(p=0.1) between the trunk and its head. In training mode two passes over the same tokens give
# different values: here they differ by about 0.1. A sequence classifier made from the same configuration has no dropout.
# Whoever builds a critic from AutoModelForTokenClassification trains with 10 % of the last hidden state dropped unless
# classifier_dropout is set to 0.
#
# Output seen:
#   token classifier: Dropout(p=0.1, inplace=False); fields of the configuration: {'attention_dropout': 0.0}
#   two passes in training mode differ by 0.12
#   sequence classifier: 0 dropout modules
#   with classifier_dropout=0.0 they differ by 0.00
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
"$folder/env/bin/python" - <<'PYTHON'
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, LlamaConfig

shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


def config(**more):
    return LlamaConfig(**shape, vocab_size=100, num_labels=1, attention_dropout=0.0, pad_token_id=0, **more)


def difference(model):
    tokens = torch.arange(1, 9)[None]
    return float((model(tokens).logits - model(tokens).logits).detach().abs().max())


torch.manual_seed(0)
plain = config()
fields = {name: value for name, value in plain.to_dict().items() if "drop" in name}
token_classifier = AutoModelForTokenClassification.from_config(plain).train()
print(f"token classifier: {token_classifier.dropout}; fields of the configuration: {fields}")
print(f"two passes in training mode differ by {difference(token_classifier):.2f}")
sequence_classifier = AutoModelForSequenceClassification.from_config(plain).train()
dropouts = [module for module in sequence_classifier.modules() if isinstance(module, torch.nn.Dropout)]
print(f"sequence classifier: {len(dropouts)} dropout modules")
without = AutoModelForTokenClassification.from_config(config(classifier_dropout=0.0)).train()
print(f"with classifier_dropout=0.0 they differ by {difference(without):.2f}")

assert fields == {"attention_dropout": 0.0}
assert token_classifier.dropout.p == 0.1 and difference(token_classifier) > 0.01
assert not dropouts and difference(without) == 0.0
PYTHON
