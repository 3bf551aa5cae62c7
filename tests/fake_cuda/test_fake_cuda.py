"""A step and a prediction on CUDA tensors without a GPU: what mixes devices or dtypes, and what the host waits for."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE, PROJECT = Path(__file__).parent, Path(__file__).parents[2]
LIBRARIES = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> Path:
    """The library made of guard.cpp, for the torch that is installed."""
    if torch.backends.cuda.is_built():
        pytest.skip("this build of torch has a device guard of its own")
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("needs g++ on Linux")
    made = tmp_path_factory.mktemp("guard") / "guard.so"
    include = ["-I", LIBRARIES / "include", "-I", LIBRARIES / "include/torch/csrc/api/include"]
    link = ["-L", LIBRARIES / "lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{LIBRARIES / 'lib'}"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", *include, "-o", made, HERE / "guard.cpp", *link]
    subprocess.run([str(part) for part in command], check=True)
    return made


def test_a_step_and_a_prediction_mix_no_devices_and_wait_only_for_their_figures(guard):
    begin = "import ctypes, runpy; ctypes.CDLL({!r}); runpy.run_path({!r}, run_name='__main__')"
    path = os.pathsep.join(map(str, (HERE, PROJECT / "tests", PROJECT, PROJECT / "core", PROJECT / "cli")))
    ended = subprocess.run(
        [sys.executable, "-c", begin.format(str(guard), str(HERE / "walk.py"))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    ways = json.loads(ended.stdout)
    assert len(ways) == 3
    for reads in ways.values():
        # Once for the figures of all micro-batches, and once for the norm.
        assert reads["step"] == {"train_step.gradient_pass": 1, "train_step.clip_gradient": 1}
        assert set(reads["prediction"]) == {"microbatches.predict_in_parts"}
