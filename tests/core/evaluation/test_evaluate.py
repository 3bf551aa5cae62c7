"""`evaluate` end to end on small shards: the values it judges are those another program computes."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import branching_rollouts, small_config, write_shard
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from critic_train.errors import DataError, ModelError
from critic_train.evaluation.evaluate import evaluate
from critic_train.events import RunEnded
from critic_train.settings import EvalSettings
from critic_train.stopping import StopRequest
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic

SAMPLE = str(Path(__file__).parents[3] / "sample_data" / "val")


def judge(**settings: object) -> dict:
    *_, last = evaluate(EvalSettings(device="cpu", **settings), StopRequest())
    assert isinstance(last, RunEnded)
    return last.result


@pytest.fixture
def critic_directory(tmp_path):
    critic = build_critic(small_config("Qwen2"), seed=0)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path / "critic"
    path.mkdir()
    save_critic(critic, path, None)
    return path


def test_the_figures_are_those_of_transformers_own_values(critic_directory, tmp_path):
    rollouts = branching_rollouts()
    shard = write_shard(tmp_path / "data" / "a.parquet", rollouts)
    result = judge(data=[str(shard)], model=[str(critic_directory)])
    model = AutoModelForTokenClassification.from_pretrained(critic_directory).eval()
    values = []
    for start, stop in zip(rollouts.offsets[:-1].tolist(), rollouts.offsets[1:].tolist(), strict=True):
        ids = torch.from_numpy(rollouts.input_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :, 0].double().numpy()
        values.append(np.concatenate([[0.0], logits[:-1]]))
    mask = rollouts.response_mask
    value, target = np.concatenate(values)[mask], rollouts.returns[mask].astype(np.float64)
    old = rollouts.values[mask].astype(np.float64)
    clipped = np.clip(value, old - 0.5, old + 0.5)
    expected = {
        "explained_variance": 1 - np.var(target - value) / np.var(target),
        "mse": np.mean((target - value) ** 2),
        "mae": np.mean(np.abs(target - value)),
        "bias": np.mean(value - target),
        "pearson": np.corrcoef(value, target)[0, 1],
        "value_loss": 0.5 * np.mean(np.maximum((value - target) ** 2, (clipped - target) ** 2)),
        "clipfrac": np.mean((clipped - target) ** 2 > (value - target) ** 2),
    }
    for name, figure in expected.items():
        assert result[name] == pytest.approx(figure, abs=2e-5, rel=2e-5), name
    assert result["critics"][str(critic_directory)]["mse"] == result["mse"]
    assert set(result["baselines"]) == {"constant", "stored", "group_mean", "fused"}


@pytest.mark.parametrize("packing", ["forest", "rows"])
def test_packing_and_token_budget_change_nothing_but_rounding(packing, critic_directory, tmp_path):
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    whole = judge(data=[str(shard)], model=[str(critic_directory)])
    parts = judge(data=[str(shard)], model=[str(critic_directory)], packing=packing, max_tokens=40)
    assert parts["mse"] == pytest.approx(whole["mse"], rel=1e-5)


def test_without_a_model_the_stored_values_are_judged(tmp_path):
    rollouts = branching_rollouts()
    shard = write_shard(tmp_path / "a.parquet", rollouts)
    mask = rollouts.response_mask
    error = rollouts.values[mask].astype(np.float64) - rollouts.returns[mask].astype(np.float64)
    assert judge(data=[str(shard)])["mse"] == pytest.approx(np.mean(error**2), rel=1e-9)


def test_several_critics_are_compared(critic_directory, tmp_path):
    critic = build_critic(small_config("Llama"), seed=1)
    critic.head.set_constant(0.1)
    other = tmp_path / "other"
    other.mkdir()
    save_critic(critic, other, None)
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    result = judge(data=[str(shard)], model=[str(critic_directory), str(other)])
    assert list(result["critics"]) == [str(critic_directory), str(other)]
    assert result["critics"][str(other)]["explained_variance"] == 0.0


def test_a_model_without_a_head_is_refused(tmp_path):
    AutoModelForCausalLM.from_config(small_config("Llama")).save_pretrained(tmp_path / "lm")
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts())
    with pytest.raises(ModelError, match="has no value head"):
        judge(data=[str(shard)], model=[str(tmp_path / "lm")])


def test_ids_beyond_the_vocabulary_are_found_before_the_model_runs(critic_directory, tmp_path):
    rollouts = branching_rollouts()
    rollouts.input_ids[rollouts.offsets[3] + 2] = 128
    shard = write_shard(tmp_path / "a.parquet", rollouts)
    with pytest.raises(DataError, match="row 3, column input_ids: found token id 128"):
        judge(data=[str(shard)], model=[str(critic_directory)])


def test_shards_without_values_are_judged_with_a_model_only(critic_directory, tmp_path):
    shard = write_shard(tmp_path / "a.parquet", branching_rollouts(), without=["values"])
    result = judge(data=[str(shard)], model=[str(critic_directory)])
    assert result["clipfrac"] is None
    assert "stored" not in result["baselines"]
    with pytest.raises(DataError, match="nothing to judge"):
        judge(data=[str(shard)])


def test_on_real_rollouts_bootstrapped_returns_flatter_the_values_they_were_made_with():
    stored = judge(data=[SAMPLE])
    assert stored["monte_carlo"]["explained_variance"] == stored["explained_variance"]  # these returns are the sums
    assert stored["advantage"] == {"gamma": 1.0, "lam": 1.0}
    bootstrapped = judge(data=[SAMPLE], returns="gae", lam=0.9)
    found = bootstrapped["monte_carlo"]
    assert found["explained_variance"] == pytest.approx(stored["explained_variance"], abs=1e-9)
    assert bootstrapped["explained_variance"] > found["explained_variance"] + 0.1
    assert found["explained_variance_excess"]["interval"][0] > 0
    assert any(sentence.endswith("the returns flatter it") for sentence in bootstrapped["words"])
    assert not any("flatter" in sentence for sentence in stored["words"])
    assert bootstrapped["advantage"] == {"gamma": 1.0, "lam": 0.9}
    automatic = judge(data=[SAMPLE], returns="mc", gamma=0.99, lam_policy="auto")
    assert automatic["advantage"] == {"gamma": 0.99, "lam": None}


def test_groups_are_named_as_in_the_shards():
    uids = set(pq.read_table(SAMPLE, columns=["uid"])["uid"].to_pylist())
    groups = judge(data=[SAMPLE])["critics"]["stored"]["groups"]
    named = [row["uid"] for name in ("best", "worst") for row in groups[name]]
    assert len(named) == len(set(named)) == 10
    assert set(named) <= uids
