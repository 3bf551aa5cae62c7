#!/usr/bin/env bash
# safetensors 0.8.0 beside 0.5.3, numpy 2.3.5.
#
# save_file of 0.8 writes a temporary file and renames it, and the file keeps that temporary file's mode: 0600, whatever the
# umask. 0.5 wrote in place and gave 0644 under the usual umask of 022. Weights that one user saves cannot be read by
# another any more, as by an RL job or an inference server that runs under an account of its own; config.json beside them can.
#
# Output seen:
#   safetensors 0.5.3, umask 022: mode 0644
#   safetensors 0.8.0, umask 022: mode 0600
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
declare -A mode
for version in 0.5.3 0.8.0; do
    "$folder/env/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.3.5
    mode[$version]="$("$folder/env/bin/python" - "$folder/weights-$version.safetensors" <<'PYTHON'
import os
import sys

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
save_file({"weight": np.zeros((2, 2), dtype=np.float32)}, sys.argv[1])
print(f"{os.stat(sys.argv[1]).st_mode & 0o777:04o}")
PYTHON
)"
    echo "safetensors $version, umask 022: mode ${mode[$version]}"
done
[[ "${mode[0.5.3]}" == 0644 && "${mode[0.8.0]}" == 0600 ]]
