"""The doctor on real rollouts, and on copies of them that were tampered with."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from critic_train.check.check import check
from critic_train.errors import DataError
from critic_train.events import RunEnded
from critic_train.settings import CheckSettings
from critic_train.stopping import StopRequest

SAMPLE = Path(__file__).parents[3] / "sample_data"


def found(*data: Path, **more: Any) -> dict[str, Any]:
    settings = CheckSettings(data=[str(path) for path in data], **more)
    ended = list(check(settings, StopRequest()))[-1]
    assert isinstance(ended, RunEnded)
    return ended.result


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pq.read_table(SAMPLE / "train" / "part-00000.parquet")


def copied(table: pa.Table, folder: Path, **columns: list[Any] | None) -> Path:
    """A shard with some columns replaced, or (None) left out."""
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.remove_column(place) if place >= 0 else table
        if column is not None:
            table = table.append_column(name, pa.array(column))
    pq.write_table(table, folder / "part.parquet")
    return folder


def lambda_returns(table: pa.Table, gamma: float, lam: float) -> list[list[float]]:
    """GAE's returns, one rollout and one token after the other."""
    columns = [table[name].to_pylist() for name in ("response_mask", "rewards", "values")]
    made = []
    for mask, rewards, values in zip(*columns, strict=True):
        returns = [0.0] * len(mask)
        advantage = following = 0.0
        for t in range(len(mask) - 1, -1, -1):
            if mask[t]:
                advantage = rewards[t] + gamma * following - values[t] + gamma * lam * advantage
                following = values[t]
                returns[t] = advantage + values[t]
        made.append(returns)
    return made


def test_real_rollouts_are_sound_and_monte_carlo():
    told = found(SAMPLE / "train")
    assert told["sound"]
    match = told["returns_match"]
    assert (match["found"], match["gamma"], match["lam"]) == (True, 1.0, 1.0)
    assert told["schema"]["returns"] == "returns"
    assert told["command"] == f"critic-train fit --data {SAMPLE / 'train'}"


def test_lambda_returns_are_recognised_and_advised_against_for_pretraining(table, tmp_path):
    told = found(copied(table, tmp_path, returns=lambda_returns(table, 0.99, 0.95)))
    match = told["returns_match"]
    assert (match["found"], match["gamma"], match["lam"]) == (True, 0.99, 0.95)
    assert "--returns mc --gamma 0.99" in told["command"]


def test_noise_matches_nothing(table, tmp_path):
    draw = np.random.default_rng(0)
    noise = [draw.normal(size=len(ids)).tolist() for ids in table["input_ids"].to_pylist()]
    assert not found(copied(table, tmp_path, returns=noise))["returns_match"]["found"]


def test_without_returns_rewards_are_advised(table, tmp_path):
    told = found(copied(table, tmp_path, returns=None))
    assert told["returns"] is told["returns_match"] is None
    assert "--returns mc" in told["command"]


def test_a_reward_that_is_missing_is_a_bad_row_where_returns_are_made_of_rewards(table, tmp_path):
    rewards = [1.0] * len(table)
    rewards[3] = None
    told = found(copied(table, tmp_path, returns=None, rewards=None, reward=rewards))
    assert not told["sound"]
    assert told["bad_rows"]["count"] == 1
    assert "row 3, column reward" in told["bad_rows"]["first"][0]
    (tmp_path / "both").mkdir()
    assert found(copied(table, tmp_path / "both", reward=rewards, rewards=None))["sound"]


def test_without_values_nothing_is_clipped(table, tmp_path):
    told = found(copied(table, tmp_path, values=None))
    assert told["values"] is told["stored_values"] is None
    assert "--old-values none" in told["command"]


def test_every_bad_row_is_named(table, tmp_path):
    returns = table["returns"].to_pylist()
    for row in range(20):
        returns[row] = returns[row][:-1]
    told = found(copied(table, tmp_path, returns=returns))
    assert not told["sound"]
    assert told["bad_rows"]["count"] == len(told["bad_rows"]["first"]) == 20
    assert "--on-bad-rows skip" in told["command"]
    assert told["rollouts"] == len(table) - 20


def test_a_leak_is_not_sound(table, tmp_path):
    for name, part in (("a", table.slice(0, 40)), ("b", table.slice(32, 40))):
        (tmp_path / name).mkdir()
        copied(part, tmp_path / name)
    told = found(tmp_path / "a", against=[str(tmp_path / "b")])
    assert not told["sound"]
    assert told["leak"]["groups"] == 1
    assert told["leak"]["rollouts"] >= 8


def test_not_one_good_row_is_an_error(table, tmp_path):
    with pytest.raises(DataError, match="there are no others"):
        found(copied(table, tmp_path, returns=[[0.0]] * len(table), values=None))
