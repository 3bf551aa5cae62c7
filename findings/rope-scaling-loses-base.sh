#!/usr/bin/env bash
# transformers 5.23.0 (no torch needed).
#
# Model cards say how a longer context is switched on: add a "rope_scaling" entry (YaRN, factor 4) to config.json. In a
# config.json that transformers 5 wrote (after fine-tuning, say), the rotary base stands in "rope_parameters" alone, and there
# the same edit loses it: "rope_scaling" takes the place of all of "rope_parameters", and as there is no "rope_theta" beside it
# the base becomes 10000, where the model was trained with 1000000. What is printed is that "rope_scaling" is deprecated, not
# that the base has changed. The comment beside this code says that "rope_parameters" has priority. In a config.json that
# transformers 4 wrote, "rope_theta" stands at the top, and the edit does what the card says. Given as an argument,
# from_pretrained(..., rope_scaling=...), the base is None.
#
# Output seen:
#   saved with base 1000000.0; read with "rope_scaling" added to config.json: 10000.0
#   the same with "rope_theta" beside it: 1000000.0
#   as an argument of from_pretrained: None
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
"$folder/venv/bin/python" - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

from transformers import AutoConfig, Qwen3Config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}).save_pretrained(sys.argv[1])
argument = AutoConfig.from_pretrained(sys.argv[1], rope_scaling=dict(YARN)).rope_parameters["rope_theta"]
file = Path(sys.argv[1], "config.json")
saved = json.loads(file.read_text())


def base(**added):
    file.write_text(json.dumps(saved | added))
    return AutoConfig.from_pretrained(sys.argv[1]).rope_parameters["rope_theta"]


assert base() == 1e6
edited, beside = base(rope_scaling=YARN), base(rope_scaling=YARN, rope_theta=1e6)
print(f'saved with base 1000000.0; read with "rope_scaling" added to config.json: {edited}')
print(f'the same with "rope_theta" beside it: {beside}')
print(f"as an argument of from_pretrained: {argument}")
assert (edited, beside, argument) == (1e4, 1e6, None)
PYTHON
