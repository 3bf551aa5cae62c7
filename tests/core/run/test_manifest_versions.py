"""The versions that a run records."""

import json
import platform

import torch
import transformers

import critic_train
from critic_train.run.manifest import versions


def test_versions_are_those_of_what_computes():
    recorded = versions()
    assert recorded["critic-train"] == critic_train.__version__
    assert recorded["python"] == platform.python_version()
    assert recorded["torch"] == torch.__version__.partition("+")[0] or recorded["torch"] == torch.__version__
    assert recorded["transformers"] == transformers.__version__
    assert list(recorded) == ["critic-train", "python", "torch", "transformers", "pyarrow", "numpy", "safetensors"]
    assert json.loads(json.dumps(recorded)) == recorded
