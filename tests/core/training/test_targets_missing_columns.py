"""Shards without returns or values: what `fit` makes of what is there, and what it advises else."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import readable_rollouts, write_shard

from critic_train.errors import ConfigError, DataError
from critic_train.events import Notice, RunEnded
from critic_train.settings import FitSettings
from critic_train.stopping import StopRequest
from critic_train.training.dry_run import dry_run
from critic_train.training.fit import fit


def shard(folder: Path, *without: str, rewards: bool = True) -> Path:
    rollouts = readable_rollouts(12, seed=1)
    path = write_shard(folder / "a.parquet", rollouts, without)
    if rewards:
        table = pq.read_table(path)
        last = rollouts.returns[rollouts.offsets[1:] - 1].astype(np.float64)
        pq.write_table(table.append_column("reward", pa.array(last)), path)
    return folder


def settings_for(data: Path, out: Path, **changes: object) -> FitSettings:
    fixed: dict[str, object] = {"data": [str(data)], "out": str(out), "preset": "tiny", "max_steps": 2, "device": "cpu"}
    return FitSettings(**(fixed | {"no_report": True, "batch_size": 16} | changes))  # type: ignore[arg-type]


def run(settings: FitSettings) -> list[str]:
    """The notices of a run that finishes."""
    events = list(fit(settings, StopRequest()))
    assert isinstance(events[-1], RunEnded)
    assert events[-1].status in ("finished", "already finished")
    return [event.message for event in events if isinstance(event, Notice)]


def test_rewards_alone_are_trained_on_as_monte_carlo_returns_without_a_clip(tmp_path):
    data = shard(tmp_path / "data", "returns", "values")
    told = run(settings_for(data, tmp_path / "chosen"))
    assert "there are no returns: Monte-Carlo returns are made of `reward` (--returns mc; --gamma is 1)" in told
    assert any(message.startswith("there are no values of a critic to clip around") for message in told)
    asked = run(settings_for(data, tmp_path / "asked", returns="mc", old_values="none"))
    assert not any("there are no" in message for message in asked)
    chosen, expected = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("chosen", "asked"))
    assert chosen == expected
    assert json.loads((tmp_path / "chosen" / "run.json").read_text())["resolved"]["returns"] == "mc, gamma 1"
    run(settings_for(data, tmp_path / "chosen"))


def test_returns_without_values_are_trained_on_without_a_clip(tmp_path):
    told = run(settings_for(shard(tmp_path / "data", "values"), tmp_path / "run"))
    assert [message for message in told if message.startswith("there are no")] == [
        "there are no values of a critic to clip around: the loss is the plain squared error (--old-values none); "
        "--old-values epoch clips around this critic's own, --column values=NAME reads a column"
    ]


def test_what_was_asked_for_stays(tmp_path):
    data = shard(tmp_path / "data", "returns", "values")
    told = run(settings_for(data, tmp_path / "run", old_values="epoch"))
    assert len([message for message in told if message.startswith("there are no")]) == 1


def test_a_dry_run_chooses_the_same(tmp_path):
    data = shard(tmp_path / "data", "returns", "values")
    events = list(dry_run(settings_for(data, tmp_path / "run"), tmp_path / "run", StopRequest()))
    assert len([e for e in events if isinstance(e, Notice) and e.message.startswith("there are no")]) == 2


@pytest.mark.parametrize(
    ("without", "rewards", "changes", "hint"),
    [
        (
            ("returns", "values"),
            False,
            {},
            "with a column `reward`, one number a rollout, fit makes",
        ),
        (
            ("values",),
            True,
            {"returns": "gae", "lam": 0.9, "old_values": "none"},
            "--old-values epoch takes this critic's",
        ),
        (
            ("values",),
            True,
            {"returns": "gae", "lam": 0.9},
            "--old-values epoch takes this critic's own at each epoch's",
        ),
    ],
)
def test_where_nothing_can_be_made_the_hint_is_not_what_was_given(without, rewards, changes, hint, tmp_path):
    data = shard(tmp_path / "data", *without, rewards=rewards)
    with pytest.raises(DataError) as caught:
        run(settings_for(data, tmp_path / "run", **changes))
    assert hint in caught.value.hint
    assert "--old-values none" not in caught.value.message + caught.value.hint
    if "returns" in changes:
        run(settings_for(data, tmp_path / "advised", **(changes | {"old_values": "epoch"})))


def test_texts_name_the_command_that_makes_token_ids(tmp_path):
    (tmp_path / "data").mkdir()
    table = pa.table({"messages": [[{"role": "user", "content": "hi"}]], "score": [1.0]})
    pq.write_table(table, tmp_path / "data" / "a.parquet")
    with pytest.raises(DataError) as caught:
        run(settings_for(tmp_path / "data", tmp_path / "run"))
    assert f"critic-train convert {tmp_path}/data/a.parquet --to shards/ makes token ids of texts" in caught.value.hint


def test_a_run_is_not_put_among_other_data(tmp_path):
    data = shard(tmp_path / "data")
    for out in (data, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=rf"--out {out} holds other data: .*a\.parquet") as caught:
            run(settings_for(data, out))
        assert caught.value.hint.endswith(f"--out {out}/run")
        assert sorted(tmp_path.rglob("*")) == before
