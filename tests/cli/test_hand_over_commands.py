"""`critic-train export` and `critic-train show` as a user meets them."""

import json
from functools import partial

import pytest
from small_critics import critic_of
from support import readable_rollouts, write_shard
from warm import program

from critic_train.weights.saving import save_critic


@pytest.fixture
def run(clean_environment, tmp_path):
    (tmp_path / "model").mkdir()
    save_critic(critic_of("Llama"), tmp_path / "model", None)
    write_shard(tmp_path / "data" / "a.parquet", readable_rollouts(6))
    return partial(program, cwd=tmp_path, environment=clean_environment)


def test_export_says_what_it_did_and_how_it_is_loaded(run, tmp_path):
    shown = run("export", "model", "out", "--to", "vllm")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("Exported for vllm: out (")
    for said in (
        "LlamaForSequenceClassification",
        "score.weight",
        "0.25: score.bias",
        "loaded again",
        "vllm serve out",
    ):
        assert said in shown.stdout
    told = json.loads(run("export", "model", "out2", "--to", "verl", "--json").stdout)
    assert (told["status"], told["usage"]) == ("finished", ["critic.model.path=out2"])
    assert (tmp_path / "out2" / "config.json").is_file()


def test_export_refuses_with_what_to_do(run, tmp_path):
    shown = run("export", "model", "out", "--to", "openrlhf")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert "hint: --data ROLLOUTS fits the head without a bias" in shown.stderr
    assert not (tmp_path / "out").exists()


def test_show_prints_the_group(run):
    shown = run("show", "model", "--data", "data", "--uid", "3")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("uid 3 (4 rollouts)") == 4
    assert "value     old  return" in shown.stdout
    told = json.loads(run("show", "--data", "data", "--show", "2", "--json").stdout)
    assert [record["uid"] for record in told["rollouts"]] == ["0", "0"]
