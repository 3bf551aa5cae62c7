"""Which commands need the critics' libraries."""

import subprocess
import sys

from support import branching_rollouts, write_shard


def test_stored_values_are_judged_without_torch_and_transformers(tmp_path):
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    code = (
        "import sys\n"
        "from critic_train import EvalSettings, evaluate\n"
        f"*_, ended = evaluate(EvalSettings(data=[{str(shard)!r}]))\n"
        "assert ended.result['explained_variance'] is not None\n"
        "assert 'critic_train.evaluation.judged_critics' not in sys.modules\n"
        "print(sorted({'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
