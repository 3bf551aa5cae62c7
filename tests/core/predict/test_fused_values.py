"""`predict --baseline fused`: what it writes is what `eval` judges as the fused baseline."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import readable_rollouts, small_config, write_shard

from critic_train.data.returns import ReturnRecipe, gae
from critic_train.errors import ConfigError, DataError
from critic_train.evaluation.judge import Judge
from critic_train.predict.fused_values import FusedValues
from critic_train.predict.predict import part_of_this_process, predict
from critic_train.settings import PredictSettings
from critic_train.weights.loading import build_critic
from critic_train.weights.saving import save_critic


@pytest.fixture(scope="module")
def tiny_critic(tmp_path_factory) -> Path:
    made = build_critic(small_config("Qwen2"), seed=0)
    with torch.no_grad():
        made.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("critic")
    save_critic(made, path, None)
    return path


def world(rewards=True, seed=0):
    rollouts = readable_rollouts(10, seed=seed, responses=5)
    rng = np.random.default_rng(seed)
    given = np.where(rollouts.response_mask, rng.normal(size=len(rollouts.returns)), 0).astype(np.float32)
    values = (rollouts.returns * 0.5 + rng.normal(0, 0.3, len(rollouts.returns))).astype(np.float32)
    return replace(rollouts, rewards=given if rewards else None), values


def fused_by_parts(rollouts, values, recipe):
    """Two files of two batches each, taken in one after another."""
    fused = FusedValues(recipe)
    batches = np.array_split(np.arange(len(rollouts)), 4)
    parts = []
    for number, index in enumerate(batches):
        part = replace(rollouts.take(index), row=np.arange(len(index)) + 100 * (number % 2))
        tokens = np.isin(np.repeat(np.arange(len(rollouts)), rollouts.lengths), index)
        parts.append((f"file {number // 2}", part, values[tokens]))
    for part in parts:
        fused.add(*part)
    fused.estimate()
    # Asked for in another order of files.
    found = {number: fused.of(*parts[number]) for number in (2, 3, 0, 1)}
    return np.concatenate([found[number] for number in range(4)])


@pytest.mark.parametrize("rewards", [True, False])
def test_it_is_what_eval_judges(rewards):
    rollouts, values = world(rewards)
    kind = "mc" if rewards else "column"
    found = fused_by_parts(rollouts, values, ReturnRecipe(kind=kind))
    assert (found[~rollouts.response_mask] == 0).all()
    judge = Judge(["c"], resamples=5)
    judge.add(rollouts, {"c": values})
    baseline = judge.verdict()["baselines"]["fused"]
    again = Judge(["c"], resamples=5)
    again.add(rollouts, {"c": found})
    stored = again.verdict()["critics"]["c"]
    for name in ("mse", "explained_variance", "bias", "advantage_variance"):
        assert stored[name] == pytest.approx(baseline[name], abs=1e-5), name


def test_rollouts_that_are_dropped_count_nowhere_and_keep_their_values():
    rollouts, values = world()
    cut = np.arange(len(rollouts)) % 5 == 0
    recipe = ReturnRecipe(kind="mc", truncated="drop")
    found = fused_by_parts(replace(rollouts, truncated=cut), values, recipe)
    tokens = np.repeat(cut, rollouts.lengths) & rollouts.response_mask
    assert np.array_equal(found[tokens], values[tokens])
    kept = np.flatnonzero(~cut)
    among = fused_by_parts(rollouts.take(kept), values[np.repeat(~cut, rollouts.lengths)], ReturnRecipe(kind="mc"))
    assert found[np.repeat(~cut, rollouts.lengths)] == pytest.approx(among, abs=1e-6)


def test_too_few_prompts_are_refused():
    rollouts, values = world()
    two = rollouts.take(np.arange(10))
    fused = FusedValues(ReturnRecipe(kind="mc"))
    fused.add("a", two, values[: int(two.offsets[-1])])
    with pytest.raises(DataError, match=r"--baseline fused cannot be estimated: 10 rollouts of 2 prompts"):
        fused.estimate()
    with pytest.raises(DataError, match="0 rollouts of 0 prompts"):
        FusedValues(ReturnRecipe(kind="mc")).estimate()


def test_it_needs_all_files_in_one_process():
    settings = PredictSettings(data=["x"], model="m", to="t", baseline="fused", part="1/2")
    with pytest.raises(ConfigError, match="--baseline fused needs all files in one process"):
        part_of_this_process(settings)


def write_in_two(folder: Path, rollouts, uids=None) -> None:
    """The rollouts in two files, with their rewards, and with other uids where they are given."""
    for number, index in enumerate(np.array_split(np.arange(len(rollouts)), 2)):
        part = rollouts.take(index)
        path = write_shard(folder / f"{number}.parquet", part)
        rewards = [part.rewards[a:b].tolist() for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]
        table = pq.read_table(path).append_column("rewards", pa.array(rewards))
        if uids is not None:
            table = table.set_column(0, "uid", pa.array([uids[i] for i in index]))
        pq.write_table(table, path)


def written_values(to: Path, name: str = "values") -> np.ndarray:
    """A column of the two files, end to end."""
    tables = [pq.read_table(to / f"{number}.parquet") for number in range(2)]
    return np.concatenate([np.concatenate(table[name].to_pylist()) for table in tables]).astype(np.float32)


@pytest.mark.parametrize(
    ("uids", "group_by"),
    [("anew", None), ("own", None), ("own", "prompt"), ("anew", "prompt"), ("one", "prompt")],
)
def test_groups_are_those_of_all_files_at_once(tmp_path: Path, tiny_critic, uids, group_by):
    rollouts, _ = world()
    count = len(rollouts)
    prompts = np.unique(rollouts.group, return_inverse=True)[1]
    made = {
        "anew": [str(prompt - (i >= count // 2) * prompts[count // 2 :].min()) for i, prompt in enumerate(prompts)],
        "own": [f"request-{i}" for i in range(count)],
        "one": ["same"] * count,
    }[uids]
    write_in_two(tmp_path / "rollouts", rollouts, made)
    common = {"data": [str(tmp_path / "rollouts")], "model": str(tiny_critic), "device": "cpu", "returns": "mc"}
    for baseline in ("critic", "fused"):
        grouping = {"group_by": group_by} if baseline == "fused" else {}
        list(predict(PredictSettings(**common, **grouping, to=str(tmp_path / baseline), baseline=baseline)))
    expected = fused_by_parts(rollouts, written_values(tmp_path / "critic"), ReturnRecipe(kind="mc"))
    assert written_values(tmp_path / "fused") == pytest.approx(expected, abs=1e-5)


def test_group_by_needs_the_fused_baseline():
    settings = {"data": ["x"], "model": "m", "to": "t", "group_by": "prompt"}
    with pytest.raises(ConfigError, match="--group-by needs --baseline fused"):
        PredictSettings(**settings)


def test_predict_writes_its_values_and_advantages(tmp_path: Path, tiny_critic):
    rollouts, _ = world()
    folder = tmp_path / "rollouts"
    write_in_two(folder, rollouts)
    common = {"data": [str(folder)], "model": str(tiny_critic), "device": "cpu", "returns": "mc"}
    written = {}
    for baseline in ("critic", "fused"):
        to = tmp_path / baseline
        settings = PredictSettings(**common, to=str(to), baseline=baseline, write=["values", "advantages"])
        events = list(predict(settings))
        assert events[-1].status == "finished"
        written[baseline] = {name: written_values(to, name) for name in ("values", "advantages")}
    assert any("fused:" in getattr(event, "message", "") for event in events)
    expected = fused_by_parts(rollouts, written["critic"]["values"], ReturnRecipe(kind="mc"))
    assert written["fused"]["values"] == pytest.approx(expected, abs=1e-5)
    advantages, _ = gae(
        rollouts.rewards, written["fused"]["values"], rollouts.response_mask, rollouts.offsets, gamma=1.0, lam=1.0
    )
    assert written["fused"]["advantages"] == pytest.approx(advantages, abs=1e-5)
