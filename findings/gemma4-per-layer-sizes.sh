#!/usr/bin/env bash
# transformers 5.23.0 (no torch needed).
#
# Code that counts operations, sizes a cache or checks a configuration asks for head_dim with a fallback:
# getattr(config, "head_dim", None) or hidden_size // num_attention_heads. On a Gemma 4 configuration, whose layers of full
# attention have larger heads than those of sliding attention, that raises: reading a size that differs between layers is an
# error of its own kind, a RuntimeError, which neither the default of getattr nor hasattr catches. The same size stands in
# config.to_dict() and in config.json, where it is that of the layers of sliding attention, and num_attention_heads, which all
# layers share, is read as ever. config.per_layer_config[i] has the sizes of each layer.
#
# Output seen:
#   getattr(config, "head_dim", None): RuntimeError (AmbiguousGlobalPerLayerAttributeError)
#   hasattr(config, "head_dim"): RuntimeError (AmbiguousGlobalPerLayerAttributeError)
#   config.to_dict()["head_dim"]: 256
#   config.per_layer_config: 256, 512
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
from transformers import Gemma4TextConfig

config = Gemma4TextConfig(num_hidden_layers=6)


def raised(read):
    try:
        return read()
    except RuntimeError as error:
        return f"RuntimeError ({type(error).__name__})"


fallback = raised(lambda: getattr(config, "head_dim", None))
present = raised(lambda: hasattr(config, "head_dim"))
sizes = sorted({layer.head_dim for layer in config.per_layer_config})
print(f'getattr(config, "head_dim", None): {fallback}')
print(f'hasattr(config, "head_dim"): {present}')
print(f'config.to_dict()["head_dim"]: {config.to_dict()["head_dim"]}')
print(f"config.per_layer_config: {', '.join(map(str, sizes))}")
assert fallback == present == "RuntimeError (AmbiguousGlobalPerLayerAttributeError)"
assert config.to_dict()["head_dim"] == 256 and sizes == [256, 512]
assert config.num_attention_heads == 8
PYTHON
