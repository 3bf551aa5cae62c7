"""`critic-train verify` as a user meets it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support import readable_rollouts, write_shard
from warm import program

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verify(clean_environment, tmp_path):
    return partial(program, "verify", cwd=tmp_path, environment=clean_environment)


def test_exit_code_lines_and_json(verify, tmp_path):
    good = write_shard(tmp_path / "good.parquet", readable_rollouts(2))
    bad = tmp_path / "bad [1].parquet"
    bad.write_bytes(good.read_bytes()[:-9])
    shown = verify(str(good))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == f"{good} (rollouts): sound\n  ok  {good}: 1 files and 8 rows read\n"
    shown = verify(str(good), str(bad))
    assert shown.returncode == 1
    assert f"{bad} (rollouts): NOT SOUND\n  BAD {bad}: " in shown.stdout
    told = json.loads(verify(str(bad), "--json").stdout)
    assert told["sound"] is False


@pytest.mark.parametrize("job", ["critic_train.verify.verify", "critic_train.check.check"])
def test_rollouts_are_looked_at_without_torch(job):
    """It takes seconds to load."""
    script = f"import {job}, sys; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "core")}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0
